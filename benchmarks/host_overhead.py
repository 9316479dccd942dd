"""What a step costs on the host when the model costs nothing: schedule, pack, send, take the ids, make the events.

The runner here packs and transfers as the real one does, but returns constant ids instead of running a model. The
yardstick is the stub-executor figure published for vLLM's engine loop on a CPU, 540 microseconds a step.

    python benchmarks/host_overhead.py                  # a table and one JSON line
    python benchmarks/host_overhead.py --plot docs/host_overhead.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.kv_cache.pages import PagePool
from torchinfer.kv_cache.prefix import PrefixCache
from torchinfer.request import Request, SamplingParams
from torchinfer.runner import Launched, StepOutput
from torchinfer.scheduler import Plan, Scheduler
from torchinfer.step_input import Ints, StepShape, pack, unpack, unpack_sampling

PAGE_SIZE = 16
MAX_MODEL_LEN = 2048
VOCAB = 32_000


class NullRunner:
    """Packs a step, makes tensors of it, and returns the same id for each row at once."""

    overlaps = False
    num_compilations = 0

    def __init__(self) -> None:
        self.seconds = 0.0  # spent in the stand-in for the model, not counted as overhead

    def warm_up(self, progress: bool) -> None:
        """Nothing to do."""

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        shape = StepShape(plan.num_tokens, len(plan.decodes) + len(plan.chunks), -(-plan.max_kv_length // PAGE_SIZE))
        packed = torch.from_numpy(pack(plan, page_table, PAGE_SIZE, shape).packed)
        unpack(packed[: shape.num_forward], shape, PAGE_SIZE, plan)
        if not plan.all_greedy:
            unpack_sampling(packed[shape.num_forward :])
        start = time.perf_counter()
        ids = torch.full((len(plan.sampled),), 5, dtype=torch.int32)
        self.seconds += time.perf_counter() - start
        return Launched(plan, ids, None, [])

    def collect(self, launched: Launched) -> StepOutput:
        return StepOutput(launched.ids.tolist())

    def num_dropped_expert_tokens(self) -> int:
        return 0


def make_engine(num_requests: int) -> tuple[Engine, NullRunner]:
    num_pages = 1 + num_requests * MAX_MODEL_LEN // PAGE_SIZE
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool,
        page_size=PAGE_SIZE,
        max_num_requests=num_requests,
        max_num_batched_tokens=max(512, num_requests),
        max_model_len=MAX_MODEL_LEN,
        prefix_cache=PrefixCache(pool, PAGE_SIZE),
    )
    info = ModelInfo(
        "null", "Null", 0, VOCAB, MAX_MODEL_LEN, "none", "cpu", num_pages, PAGE_SIZE, num_requests, (2,), False, "none"
    )
    runner = NullRunner()
    return Engine(scheduler, runner, info, None), runner


def measure(num_requests: int, num_steps: int, *, greedy: bool) -> float:
    """Microseconds of overhead a step, with `num_requests` running; one page boundary in 16 steps is in it."""
    engine, runner = make_engine(num_requests)
    params = SamplingParams(max_tokens=num_steps + 200, temperature=0.0 if greedy else 0.8, top_p=0.9)
    for index in range(num_requests):
        prompt = tuple((index * 131 + k) % VOCAB for k in range(20 + index % 16))
        engine.add(Request(f"r{index}", prompt, params))
    while engine.stats().num_running < num_requests or engine._scheduler.num_waiting:
        engine.step()
    for _ in range(50):
        engine.step()
    runner.seconds = 0.0
    start = time.perf_counter()
    for _ in range(num_steps):
        events = engine.step()
        assert len(events) == num_requests
    return (time.perf_counter() - start - runner.seconds) / num_steps * 1e6


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """An SVG of overhead against running requests, both axes linear."""
    width, height, margin = 640, 360, 56
    most_x = max(row["running"] for row in rows)
    most_y = max(max(row["greedy_us"], row["sampled_us"]) for row in rows) * 1.1

    def at(x: float, y: float) -> str:
        left = margin + x / most_x * (width - 2 * margin)
        return f"{left:.1f},{height - margin - y / most_y * (height - 2 * margin):.1f}"

    lines = []
    for name, colour in (("greedy_us", "#1f77b4"), ("sampled_us", "#d62728")):
        points = " ".join(at(row["running"], row[name]) for row in rows)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        last = at(most_x, rows[-1][name]).split(",")
        lines.append(f'<text x="{last[0]}" y="{float(last[1]) - 6}" fill="{colour}" text-anchor="end">{name}</text>')
    for row in rows:
        x, y = at(row["running"], 0).split(",")
        lines.append(f'<text x="{x}" y="{float(y) + 18}" text-anchor="middle">{row["running"]:.0f}</text>')
    for tick in range(0, int(most_y), 100):
        x, y = at(0, tick).split(",")
        lines.append(f'<text x="{float(x) - 8}" y="{float(y) + 4}" text-anchor="end">{tick}</text>')
        lines.append(f'<path d="M{x},{y} H{width - margin}" stroke="#ddd"/>')
    caption = "Host overhead against running requests, µs a step"
    title = f'<text x="{width / 2}" y="24" text-anchor="middle">{caption}</text>'
    body = "\n".join([title, *lines])
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 32, 64, 128, 192, 256])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("ceiling: at most 200 us a step at 64 running requests and 600 us at 256")
    rows = []
    for running in args.running:
        row = {"running": running}
        for name, greedy in (("greedy_us", True), ("sampled_us", False)):
            times = [measure(running, args.steps, greedy=greedy) for _ in range(args.repeats)]
            row[name] = round(statistics.median(times), 1)
        rows.append(row)
        print(f"{running:4d} running: greedy {row['greedy_us']:7.1f} us, sampled {row['sampled_us']:7.1f} us a step")
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps({"benchmark": "host_overhead", "unit": "us per step", "rows": rows}))


if __name__ == "__main__":
    main()
