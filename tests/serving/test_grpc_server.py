import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from torchinfer.errors import ConfigError, EngineError, OverloadedError, RequestError
from torchinfer.request import FinishReason, SamplingParams, Usage
from torchinfer.serving import inference_pb2 as pb
from torchinfer.serving import inference_pb2_grpc
from torchinfer.serving.client import Client
from torchinfer.serving.grpc_server import SERVICE, GrpcServer
from torchinfer.serving.options import ServerOptions

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FOREVER = SamplingParams(max_tokens=100_000)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def health(server, service=""):
    with grpc.insecure_channel(server.target) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def raw(server, message, method="GenerateOnce", **options):
    """The RpcError of a call without our client."""
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        answer = getattr(inference_pb2_grpc.InferenceStub(channel), method)(message, **options)
        list(answer)
    return caught.value


def once(**values):
    return pb.GenerateRequest(**{"text": "hi", **values})


def test_a_stream_brings_every_token_in_order(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        events = list(client.generate("abc", SamplingParams(max_tokens=6), add_special_tokens=False))
    assert "".join(e.text for e in events) == "abcabc"
    assert [i for e in events for i in e.token_ids] == list(b"abcabc")


def test_the_last_event_and_only_it_carries_usage(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        events = list(client.generate("abc", SamplingParams(max_tokens=6, n=2)))
    assert [e.usage for e in events if e.usage is not None] == [Usage(4, 3, 12)]
    assert events[-1].usage is not None


def test_each_sample_has_its_finish_reason(connect, fake_engine):
    params = SamplingParams(max_tokens=3, n=2, stop_token_ids=(ord("c"),))
    with connect(fake_engine()) as (_, client):
        events = list(client.generate([97, 98, 100, 99], params))
    ended = {e.index: (e.finish_reason, e.stop_match) for e in events if e.finish_reason}
    assert ended == {0: (FinishReason.LENGTH, None), 1: (FinishReason.STOP, 99)}


def test_log_probabilities_arrive_as_they_were_made(connect, fake_engine):
    params = SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=1)
    with connect(fake_engine()) as (_, client):
        events = list(client.generate([8, 9], params))
    assert [entry.logprob for e in events for entry in e.logprobs or []] == [-2.0, -2.25]
    (prompt_logprobs,) = [e.prompt_logprobs for e in events if e.prompt_logprobs]
    assert prompt_logprobs[0] is None
    assert prompt_logprobs[1].top == [(0, 0.0)]


def test_once_equals_the_stream(connect, fake_engine):
    params = SamplingParams(max_tokens=9, n=3, logprobs=1)
    with connect(fake_engine()) as (_, client):
        events = list(client.generate("abcd", params))
        answer = client.generate_once("abcd", params, request_id="me")
    streamed = ["".join(e.text for e in events if e.index == i) for i in range(3)]
    assert [output.text for output in answer.outputs] == streamed
    assert [len(output.logprobs) for output in answer.outputs] == [9, 9, 9]
    assert (answer.request_id, answer.usage.num_output_tokens) == ("me", 27)


def test_every_sampling_param_and_the_priority_reach_the_engine(connect, fake_engine):
    params = SamplingParams(max_tokens=2, temperature=0.7, logit_bias={5: 1.5}, stop=("x",), seed=3, min_p=0.1)
    engine = fake_engine()
    with connect(engine) as (_, client):
        client.generate_once("abc", params, priority=4)
    assert (engine.requests[0].params, engine.requests[0].priority) == (params, 4)


def test_tokens_within_the_interval_share_a_message(serve, fake_engine):
    server = serve(fake_engine(seconds_per_token=0.001), stream_interval_ms=100)
    with grpc.insecure_channel(server.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(once(params=pb.SamplingParams(max_tokens=60)))
        sizes = [len(response.chunk.token_ids) for response in call if response.HasField("chunk")]
    assert sizes[0] == 1
    assert sum(sizes) == 60
    assert len(sizes) < 20


def test_interval_zero_sends_tokens_one_by_one(serve, fake_engine):
    server = serve(fake_engine(seconds_per_token=0.01), stream_interval_ms=0)
    with grpc.insecure_channel(server.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(once(params=pb.SamplingParams(max_tokens=5)))
        sizes = [len(response.chunk.token_ids) for response in call if response.HasField("chunk")]
    assert sizes == [1, 1, 1, 1, 1]


def test_tokenize_and_detokenize(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        assert client.tokenize("ab") == [256, 97, 98]
        assert client.tokenize("ab", add_special_tokens=False) == [97, 98]
        assert client.tokenize([{"role": "user", "content": "x"}])[-8:] == list(b"<answer>")
        assert client.detokenize([97, 98]) == "ab"


def test_a_large_text_is_tokenized_whole(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        assert len(client.tokenize("x" * 50_000)) == 50_001
        assert client.generate_once("x" * 50_000, SamplingParams(max_tokens=1)).usage.num_prompt_tokens == 50_001


def test_detokenize_refuses_ids_outside_the_vocabulary(connect, fake_engine):
    with connect(fake_engine()) as (_, client), pytest.raises(RequestError, match=r"token_ids\[1\]=300"):
        client.detokenize([97, 300])


def test_invalid_utf8_of_tokens_becomes_replacement_characters(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        assert client.detokenize([0xC3, 0x28]) == "�("
        assert client.generate_once([0xFF], SamplingParams(max_tokens=2)).outputs[0].text == "��"


def test_get_model_tells_all_facts(connect, fake_engine):
    with connect(fake_engine()) as (_, client):
        model = client.get_model()
    assert not [f.name for f in pb.GetModelResponse.DESCRIPTOR.fields if not getattr(model, f.name)]
    assert (model.name, model.max_model_len, list(model.eos_token_ids)) == ("fake", 64, [257])


def test_a_model_without_tokenizer_answers_token_ids(connect, fake_engine):
    with connect(fake_engine(tokenizer=None)) as (_, client):
        assert list(client.generate_once([5, 6], SamplingParams(max_tokens=2)).outputs[0].token_ids) == [5, 6]
        with pytest.raises(RequestError, match="no tokenizer; send token_ids"):
            client.generate_once("text")


def test_a_client_that_leaves_frees_its_request(connect, fake_engine):
    engine = fake_engine(seconds_per_token=0.01)
    with connect(engine) as (_, client):
        stream = client.generate("abc", FOREVER, request_id="leaver")
        next(stream)
        stream.close()
        wait_for(lambda: engine.num_open == 0)
    assert engine.aborted == ["leaver"]


def test_a_client_whose_connection_closes_frees_its_request(serve, fake_engine):
    engine = fake_engine(seconds_per_token=0.01)
    client = Client(serve(engine).target)
    next(client.generate("abc", FOREVER, request_id="gone"))
    client.close()
    wait_for(lambda: engine.aborted == ["gone"])


@pytest.mark.parametrize("method", ["generate", "generate_once"])
def test_a_deadline_frees_the_request(connect, fake_engine, method):
    engine = fake_engine(seconds_per_token=0.01)
    with connect(engine) as (_, client):
        with pytest.raises(EngineError, match="DEADLINE_EXCEEDED"):
            list(getattr(client, method)("abc", FOREVER, timeout=0.2))
        wait_for(lambda: engine.num_open == 0)
    assert len(engine.aborted) == 1


def test_a_full_queue_is_resource_exhausted_with_a_hint(serve, fake_engine):
    error = raw(serve(fake_engine(capacity=0)), once())
    metadata = dict(error.trailing_metadata())
    retry = error_details_pb2.RetryInfo()
    status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details[0].Unpack(retry)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert metadata["retry-after-ms"] == "1250"
    assert retry.retry_delay.ToMilliseconds() == 1250


def test_the_client_raises_overloaded_with_the_hint(connect, fake_engine):
    with connect(fake_engine(capacity=0)) as (_, client), pytest.raises(OverloadedError) as caught:
        client.generate_once("abc")
    assert caught.value.retry_after_seconds == 1.25


def test_a_bad_request_harms_itself_only(connect, fake_engine):
    with connect(fake_engine(seconds_per_token=0.005)) as (server, client):
        stream = client.generate("abc", SamplingParams(max_tokens=60), add_special_tokens=False)
        first = next(stream)
        error = raw(server, once(params=pb.SamplingParams(top_p=7, n=99)))
        text = first.text + "".join(e.text for e in stream)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "top_p=7" in error.details() and "n=99" in error.details()
    assert text == "abc" * 20


def test_very_many_problems_still_reach_the_client(serve, fake_engine):
    chat = pb.Chat(messages=[pb.ChatMessage(content="no role")] * 5000)
    error = raw(serve(fake_engine()), pb.GenerateRequest(chat=chat))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "chat.messages[7] has no role" in error.details() and "characters in all" in error.details()


def test_a_request_id_that_is_open_is_refused(connect, fake_engine):
    with connect(fake_engine(seconds_per_token=0.01)) as (_, client):
        stream = client.generate("abc", FOREVER, request_id="same")
        next(stream)
        with pytest.raises(RequestError, match="'same' is open already"):
            client.generate_once("abc", request_id="same")
        stream.close()


def test_a_number_too_large_for_the_wire_is_a_request_error(connect, fake_engine):
    with connect(fake_engine()) as (_, client), pytest.raises(RequestError, match="cannot be sent"):
        client.generate_once("abc", SamplingParams(max_tokens=2**40))


def test_an_unforeseen_exception_is_internal_and_tells_nothing(serve, fake_engine, caplog):
    error = raw(serve(fake_engine(crash=KeyError("secret"))), once())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    error_id = error.details().split()[2].rstrip(";")
    assert error_id in caplog.text and "KeyError" in caplog.text


def test_a_message_over_the_limit_is_refused(connect, fake_engine):
    with connect(fake_engine(), max_message_bytes=1000) as (_, client), pytest.raises(RequestError, match="larger"):
        client.generate_once("x" * 2000)


def test_health_follows_loading_serving_and_failure(serve, fake_engine):
    engine, server = fake_engine(), serve(None)
    assert [health(server), health(server, SERVICE)] == [NOT_SERVING, NOT_SERVING]
    server.run(server.server.serve(engine))
    assert [health(server), health(server, SERVICE)] == [SERVING, SERVING]
    engine.failure = "broken"
    wait_for(lambda: [health(server), health(server, SERVICE)] == [NOT_SERVING, NOT_SERVING])


def test_calls_while_the_model_loads_are_unavailable(serve):
    error = raw(serve(None), once())
    assert (error.code(), "the model is loading" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)


def test_wait_until_serving(serve, fake_engine):
    server = serve(None)
    with Client(server.target) as client:
        with pytest.raises(EngineError, match="its state is NOT_SERVING"):
            client.wait_until_serving(0.2)
        threading.Timer(0.3, lambda: server.run(server.server.serve(fake_engine()))).start()
        client.wait_until_serving(10)
        assert health(server) == SERVING


def test_wait_until_serving_tells_that_no_server_is_there():
    with Client("localhost:1") as client, pytest.raises(EngineError, match=r"localhost:1 is not serving.*UNAVAILABLE"):
        client.wait_until_serving(0.2)


def test_reflection_lists_the_services(serve, fake_engine):
    with grpc.insecure_channel(serve(fake_engine()).target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_a_failing_engine_ends_open_streams_with_an_error(connect, fake_engine):
    engine = fake_engine(fail_after_tokens=3)
    with connect(engine) as (server, client):
        stream, events = client.generate("abc", FOREVER), []
        with pytest.raises(EngineError, match="step 7 ran out of memory"):
            events.extend(stream)
        with pytest.raises(EngineError, match="step 7 ran out of memory"):
            client.generate_once("abc")
        wait_for(lambda: health(server) == NOT_SERVING)


def test_a_failing_engine_still_sends_the_final_event(serve, fake_engine):
    server, messages = serve(fake_engine(fail_after_tokens=3)), []
    with grpc.insecure_channel(server.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(once())
        with pytest.raises(grpc.RpcError):
            messages.extend(call)
    finish = [m.finish for m in messages if m.HasField("finish")] or [pb.Finish()]
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert finish[0].outcomes[0].reason == pb.FINISH_REASON_ERROR


def test_many_streams_at_once_lose_nothing(connect, fake_engine):
    with connect(fake_engine(seconds_per_token=0.002), stream_interval_ms=5) as (_, client):

        def text(number):
            events = client.generate(f"{number:03d}", SamplingParams(max_tokens=30), add_special_tokens=False)
            return "".join(e.text for e in events)

        with ThreadPoolExecutor(200) as pool:
            texts = list(pool.map(text, range(200)))
    assert texts == [f"{number:03d}" * 10 for number in range(200)]


def test_a_drain_lets_open_streams_end(connect, fake_engine):
    with connect(fake_engine(seconds_per_token=0.02)) as (server, client):
        stream = client.generate("abc", SamplingParams(max_tokens=30), add_special_tokens=False)
        first = next(stream)
        drained = threading.Thread(target=lambda: server.run(server.server.drain(10)))
        drained.start()
        wait_for(lambda: server.server.service.is_draining)
        assert first.text + "".join(e.text for e in stream) == "abc" * 10
        drained.join(10)


def test_a_draining_server_refuses_new_calls_and_is_not_serving(connect, fake_engine):
    engine = fake_engine(seconds_per_token=0.02)
    with connect(engine) as (server, client):
        stream = client.generate("abc", SamplingParams(max_tokens=50))
        next(stream)
        drained = threading.Thread(target=lambda: server.run(server.server.drain(10)))
        drained.start()
        wait_for(lambda: server.server.service.is_draining)
        assert health(server) == NOT_SERVING
        with pytest.raises(EngineError, match="shutting down"):
            client.generate_once("abc")
        list(stream)
        drained.join(10)
    assert engine.is_closed


def test_a_drain_ends_the_rest_with_an_abort_event(serve, fake_engine):
    server, messages = serve(fake_engine(seconds_per_token=0.02)), []
    with grpc.insecure_channel(server.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(once(params=pb.SamplingParams(max_tokens=100_000)))
        messages.append(next(call))
        server.run(server.server.drain(0.1))
        with pytest.raises(grpc.RpcError):
            for message in call:
                messages.append(message)
    assert messages[-1].finish.outcomes[0].reason == pb.FINISH_REASON_ABORT
    assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_drain_of_an_idle_server_with_a_health_watcher_ends(serve, fake_engine):
    server = serve(fake_engine())
    with grpc.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        server.run(server.server.drain(5))
        assert next(watch).status == NOT_SERVING


def test_a_port_in_use_is_named_with_the_way_out(serve, fake_engine):
    server = serve(fake_engine())
    with pytest.raises(ConfigError, match=rf"cannot listen on localhost:{server.server.port}: Address already in use"):
        serve(fake_engine(), port=server.server.port)


def test_a_port_in_use_by_another_program_is_refused():
    async def start(port):
        await GrpcServer(ServerOptions(host="127.0.0.1", port=port)).start()

    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(ConfigError, match="choose another --port"):
            asyncio.run(start(other.getsockname()[1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 70000}, "port=70000"),
        ({"drain_seconds": -1}, "drain_seconds=-1"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"tls_cert": "c.pem"}, "tls_cert is given without tls_key"),
        ({"tls_client_ca": "c.pem"}, "client certificates need TLS"),
    ],
)
def test_server_options_are_checked(options, text):
    with pytest.raises(ConfigError, match=text):
        ServerOptions(**options)
