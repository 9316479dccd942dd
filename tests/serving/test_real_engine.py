"""The server with the real engine and the tiny checkpoint of the recipes, as one process would run it."""

import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from torchinfer import LLM, AsyncEngine, EngineConfig
from torchinfer.errors import EngineError, RequestError
from torchinfer.request import FinishReason, SamplingParams
from torchinfer.serving.client import Client

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"
OPTIONS = {"device": "cpu", "dtype": "float32", "progress": False}  # bfloat16 has ties that the batch size decides
GREEDY = SamplingParams(max_tokens=12, temperature=0)
LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason=f"needs the checkpoint {MODEL}")


def engine():
    return AsyncEngine.from_config(EngineConfig(model=MODEL, **OPTIONS))


def joined(events):
    return "".join(event.text for event in events)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, **OPTIONS) as llm:
        yield llm


def test_the_stream_equals_the_library(connect, llm):
    (expected,) = llm.generate(["def main("], GREEDY)
    with connect(engine()) as (_, client):
        events = list(client.generate("def main(", GREEDY))
    assert (joined(events), [i for e in events for i in e.token_ids]) == (expected.text, expected.token_ids)


def test_seeded_samples_and_their_log_probabilities_equal_the_library(connect, llm):
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=3, n=2, logprobs=2, prompt_logprobs=1)
    expected = llm.generate(["x = "], params)
    with connect(engine()) as (_, client):
        events = list(client.generate("x = ", params))
    for sample in expected:
        mine = [event for event in events if event.index == sample.index]
        assert joined(mine) == sample.text
        assert [entry for event in mine for entry in event.logprobs or []] == sample.logprobs
    assert [e.prompt_logprobs for e in events if e.prompt_logprobs] == [expected[0].prompt_logprobs]


def test_many_streams_at_once_equal_the_library(connect, llm):
    prompts = [f"value_{number} = " for number in range(24)]
    expected = [output.text for output in llm.generate(prompts, GREEDY)]
    with connect(engine()) as (_, client), ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda prompt: joined(client.generate(prompt, GREEDY)), prompts))
    assert texts == expected


def test_a_stop_string_ends_the_stream(connect, llm):
    text = llm.generate(["def main("], GREEDY)[0].text
    stop = text[4:7]
    with connect(engine()) as (_, client):
        events = list(client.generate("def main(", SamplingParams(max_tokens=12, temperature=0, stop=(stop,))))
    assert joined(events) == text[: text.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_match) == (FinishReason.STOP, stop)


def test_a_client_that_leaves_frees_its_request(connect):
    running = engine()
    with connect(running) as (_, client):
        stream = client.generate("def main(", LONG)
        next(stream)
        stream.close()
        for _ in range(500):
            if running.num_open == 0 and running.stats().num_running == 0:
                break
            threading.Event().wait(0.01)
    assert (running.num_open, running.stats().num_running) == (0, 0)


def test_what_depends_on_the_model_is_refused(connect):
    with connect(engine()) as (_, client), pytest.raises(RequestError, match=r"stop_token_ids \[99999\]"):
        client.generate_once("x", SamplingParams(stop_token_ids=(99999,)))


def test_model_facts(connect):
    with connect(engine()) as (_, client):
        model = client.get_model()
    assert (model.name, model.architecture, model.has_tokenizer) == ("tiny-llama", "LlamaForCausalLM", True)


class ServerProcess:
    """`torchinfer serve` on a free port."""

    def __init__(self, *options):
        command = [sys.executable, "-m", "torchinfer.cli", "serve", "--model", str(MODEL), "--device", "cpu"]
        command += ["--host", "localhost", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")

    def ready_line(self):
        lines = queue.SimpleQueue()
        threading.Thread(target=lambda: lines.put(self.process.stdout.readline()), daemon=True).start()
        return lines.get(timeout=60)

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start_process():
    started = []

    def start(*options):
        started.append(ServerProcess(*options))
        return started[-1]

    yield start
    for process in started:
        process.end()


def test_sigterm_drains_the_process_and_exits_with_0(start_process):
    server = start_process()
    target = server.ready_line().split(" on ")[1].split()[0]
    with Client(target) as client:
        client.wait_until_serving(10)
        stream = client.generate("def main(", LONG)
        tokens = next(stream).token_ids
        server.process.send_signal(signal.SIGTERM)
        for event in stream:
            tokens += event.token_ids
    assert len(tokens) == 100
    assert server.process.wait(20) == 0


def test_a_process_that_may_not_drain_ends_its_streams_with_an_error(start_process):
    server = start_process("--drain-seconds", "0")
    target = server.ready_line().split(" on ")[1].split()[0]
    with Client(target) as client:
        stream = client.generate("def main(", LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(EngineError):
            list(stream)
    assert server.process.wait(20) == 0


def test_a_checkpoint_that_is_not_there_is_one_line_and_exit_code_1():
    command = [sys.executable, "-m", "torchinfer.cli", "serve", "--model", "/nowhere", "--host", "localhost"]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("torchinfer: error: ")] == []
    assert "/nowhere" in done.stderr
