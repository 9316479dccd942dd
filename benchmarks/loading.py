"""How fast checkpoints load, and in how much memory: ours against the storage's own speed and against other loaders.

    1  files in the page cache -> parameters on the CPU    limit: parallel pread into as much fresh memory
    2  files on the local disk, none of it cached          limit: the disk's own sequential rate (O_DIRECT)
    3  Cloud Storage, emulated: FUSE mount and gs://       limit: streams x the rate of one
    4  host memory above the parameters, while loading     limit: --load-memory
    5  INT8 on the way, against the same load without      limit: 1.1 times the time where storage is slow

    python benchmarks/loading.py --work /tmp/loading --figure 1 2 4 --peer-python peers/bin/python
    python benchmarks/loading.py --work /tmp/loading --figure 3 --plot docs
    python benchmarks/loading.py --work /tmp/loading --gigabytes 0.2 --megabytes-per-stream 16 --repeats 1

Each load runs in a fresh process and is timed inside it, imports excluded; the methods take turns. Checkpoints are made
in --work and stay there: 8 GB for figures 1, 2 and 5, four times as much more for 4. The last line is a quick check.
The peers' packages: safetensors, runai-model-streamer[gcs], fastsafetensors, transformers; what is missing is listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bars import plot_bars
from loading_gcs import client_env, counted, mount, serve
from loading_run import Bench, Case, Place, Row, make_once, summarize

STREAM_RATE = 200e6  # bytes per second of one stream of Cloud Storage
MAPPED = "safetensors mapped"  # has read nothing when it is done
PEERS = (MAPPED, "safetensors cloned", "safetensors pread", "runai", "fastsafetensors")
BUFFERED = {
    "RUNAI_STREAMER_FS_STRATEGY": "sync_buffered",
    "FASTSAFETENSORS_ODIRECT": "0",
}  # or they skip the page cache
READERS = (1, 4, 16)
QUANTIZED_READERS = 4
MEMORY_LIMITS = (2 << 30, 256 << 20)
# Float32 becomes bfloat16 on the way, and Falcon's q, k and v are turned.
MODELS = (("dense", "bf16"), ("moe", "bf16"), ("dense", "f32"), ("moe", "f32"), ("falcon", "f32"))
HELD_AS = ("bf16", "int8", "int4_g64")  # of figure 4: what bf16 is loaded to


@dataclass(frozen=True)
class Figure:
    """One figure, measured."""

    number: int
    title: str
    limit: str
    rows: list[Row]
    unit: str = "GB/s"
    value: str = "gb_s"  # the key of the bars' lengths
    line: float | None = None  # drawn through the bars


def page_cache(bench: Bench, args: argparse.Namespace) -> Figure:
    """Figure 1."""
    folder = bench.checkpoint(args.gigabytes)
    limits = [
        Case(f"pread, {memory} memory, {count(threads, 'thread')}", "limit", folder, pread_task(memory, threads))
        for memory, threads in (("fresh", 2), ("huge", 1), ("huge", 2), ("huge", 4), ("reused", 2))
    ]
    peers = [Case(name, "peer", folder, {"method": name}, env=BUFFERED) for name in PEERS]
    cases = [*limits, Case("ours", "ours", folder, {"method": "ours"}), *peers]
    for case in cases:
        case.task["is_settled"] = True
    bench.run(limits[0])  # brings the files into the page cache
    rows = [summarize(case, found) for case, found in pair(cases, bench.rounds(cases))]
    best = max(row["gb_s"] for row in rows if row["kind"] == "limit" and "reused" not in row["name"])
    reused = max(row["gb_s"] for row in rows if "reused" in row["name"])
    limit = f"{best:.2f} GB/s by parallel pread into fresh memory, {reused:.2f} into memory that was used before"
    warn(rows, lambda share: share > 0.01, "was not all in the page cache")
    return Figure(1, "Page cache to CPU parameters, bfloat16", limit, with_fraction(rows, best), line=best)


def pread_task(memory: str, threads: int) -> dict[str, Any]:
    return {"method": "pread", "memory": memory, "threads": threads}


def cold_files(bench: Bench, args: argparse.Namespace) -> Figure:
    """Figure 2."""
    folder = bench.checkpoint(args.gigabytes)
    cases = [
        Case(f"disk, O_DIRECT, {count(threads, 'reader')}", "limit", folder, {"method": "disk", "threads": threads})
        for threads in (1, 4, 16)
    ]
    cases.append(Case("ours", "ours", folder, {"method": "ours"}))
    cases += [Case(name, "peer", folder, {"method": name}) for name in PEERS[1:]]
    for case in cases:
        case.task.update(is_cold=True, is_settled=True)
    rows = [summarize(case, found) for case, found in pair(cases, bench.rounds(cases))]
    best = max(row["gb_s"] for row in rows if row["kind"] == "limit")
    warn(rows, lambda share: share < 0.99, "was partly cached")
    limit = f"{best:.2f} GB/s, the disk's sequential rate around the page cache"
    return Figure(2, "Cold files on the local disk to CPU parameters", limit, with_fraction(rows, best), line=best)


def cloud_storage(bench: Bench, args: argparse.Namespace) -> Figure:
    """Figure 3."""
    rate = STREAM_RATE / args.scale
    with serve(bench.work / "gcs", latency=args.latency, rate=rate) as endpoint:
        cases = [case for readers in READERS for case in cloud_cases(bench, args, endpoint, readers)]
        cases = [case for case in cases if case.kind != "peer" or not args.without_peers]
        streams: dict[str, list[int]] = {case.name: [] for case in cases}
        results = bench.rounds([count_streams(case, endpoint, streams[case.name]) for case in cases])
    rows = [summarize(case, found) for case, found in pair(cases, results)]
    default = next((row.get("gb_s") for row in rows if row["name"].startswith("safetensors")), None)
    for row, case in zip(rows, cases, strict=True):
        if "gb_s" in row:
            row["fraction"] = round(row["gb_s"] * 1e9 / rate / case.task["readers"], 3)
            row["over_safetensors"] = round(row["gb_s"] / default, 2) if default else None
            row["streams"] = max(streams[case.name])
    return Figure(3, "Emulated Cloud Storage to CPU parameters", describe_emulation(args, rate), rows)


def count_streams(case: Case, endpoint: str, streams: list[int]) -> Case:
    assert case.at is not None
    return dataclasses.replace(case, at=functools.partial(counted, case.at, endpoint, streams))


def cloud_cases(bench: Bench, args: argparse.Namespace, endpoint: str, readers: int) -> list[Case]:
    """What is measured with so many readers; the checkpoint grows with them, so that each gets as many bytes."""
    gigabytes = readers * args.megabytes_per_stream / 1000
    folder = make_once(bench.work / "gcs" / "models", gigabytes, "dense", "bf16", max(1, readers // 4))
    fuse, env, cases = functools.partial(mount, endpoint, f"models/{folder.name}"), client_env(endpoint), []

    def gs() -> AbstractContextManager[Path | str]:
        return nullcontext(f"gs://models/{folder.name}")

    tasks: dict[str, dict[str, Any]] = {
        "ours": {"method": "ours", "options": {"readers": readers}},
        "runai": {"method": "runai"},
    }
    places: list[tuple[str, Place, dict[str, Any]]] = [
        ("FUSE", fuse, pread_task("fresh", readers)),
        ("gs://", gs, {"method": "raw http", "threads": readers}),
    ]
    for where, place, raw in places:
        for name, task in {"raw reads": raw, **tasks}.items():
            kind = {"ours": "ours", "runai": "peer"}.get(name, "limit")
            label = f"{name}, {where}, {count(readers, 'reader')}"
            cases.append(Case(label, kind, folder, {**task, "readers": readers}, place, env))
    if readers == 1:  # these read in one thread, whatever one wishes
        for name in ("safetensors cloned", "transformers"):
            cases.append(Case(f"{name}, FUSE", "peer", folder, {"method": name, "readers": 1}, fuse, env))
    return cases


def describe_emulation(args: argparse.Namespace, rate: float) -> str:
    """What was emulated, and how it differs from Cloud Storage."""
    here, there = (args.latency / (args.latency + (128 << 20) / speed) for speed in (rate, STREAM_RATE))
    return (
        f"{rate / 1e6:g} MB/s x streams, {args.latency * 1e3:g} ms to the first byte. Rates are 1/{args.scale:g} of "
        f"{STREAM_RATE / 1e6:g} MB/s, so that {os.cpu_count()} cores can serve and read them; a request of 128 MiB "
        f"spends {here:.1%} of its time waiting, and {there:.1%} at the full rate. {args.megabytes_per_stream:g} MB a "
        "stream"
    )


def host_memory(bench: Bench, args: argparse.Namespace) -> Figure:
    """Figure 4. The most of all repeats, not the median: a limit is one only if it always holds."""
    rows = []
    for kind, dtype in MODELS:
        folder = bench.checkpoint(args.gigabytes, kind, dtype)
        bench.run(Case("warm up", "limit", folder, pread_task("fresh", 1)))
        for held, limit in itertools.product(HELD_AS if dtype == "bf16" else HELD_AS[:1], MEMORY_LIMITS):
            task = {"method": "load_model", "options": {"memory": limit}, "is_watched": True}
            if held != "bf16":
                task["keywords"] = {"quantization": held}
            case = Case(f"{kind}, {dtype} to {held}, {limit >> 20} MiB", "ours", folder, task)
            rows.append(summarize_memory(case, bench.rounds([case])[case.name], limit))
    limit_text = "--load-memory, and a tenth more"
    return Figure(
        4, "Host memory above the parameters while loading", limit_text, rows, "of the limit", "fraction", 1.1
    )


def summarize_memory(case: Case, results: list[Row], limit: int) -> Row:
    above = {
        source: max(result["memory"][source] - result["held_bytes"] for result in results)
        for source in results[0]["memory"]
    }
    row = summarize(case, results)
    row |= {"limit_mib": limit >> 20, "fraction": round(above["rss"] / limit, 3)}
    row["group_peak_by"] = results[-1]["group_peak_by"]
    return row | {f"{source}_above_mib": round(value / (1 << 20), 1) for source, value in above.items()}


def quantized(bench: Bench, args: argparse.Namespace) -> Figure:
    """Figure 5. Each storage without and with quantization in turn; rates are of the checkpoint's bytes."""
    folder = bench.checkpoint(args.gigabytes)
    bench.run(Case("warm up", "limit", folder, pread_task("fresh", 1)))
    cached = pair_of_loads("page cache", folder, {"is_settled": True})
    results = bench.rounds(cached)  # first, because cold loads leave nothing in the cache
    rate = STREAM_RATE / args.scale
    with serve(bench.work / "gcs", latency=args.latency, rate=rate) as endpoint:
        slow = pair_of_loads("cold disk", folder, {"is_settled": True, "is_cold": True})
        slow += cloud_pair(bench, args, endpoint)
        results |= bench.rounds(slow)
    cases = [*cached, *slow]
    rows = [summarize(case, found) for case, found in pair(cases, results)]
    for plain, packed in zip(rows[::2], rows[1::2], strict=True):
        packed["time_ratio"] = round(plain["gb_s"] / packed["gb_s"], 3)
    warn(rows[:2], lambda share: share > 0.01, "was not all in the page cache")
    warn(rows[2:4], lambda share: share < 0.99, "was partly cached")
    limit = (
        f"1.1 times the time without it, where storage is the limit (gs://: {QUANTIZED_READERS} streams of "
        f"{rate / 1e6:g} MB/s); the rate of packing is that from the page cache, where nothing else is"
    )
    return Figure(5, "INT8 on the way to CPU parameters", limit, rows)


def pair_of_loads(where: str, folder: Path, task: dict[str, Any], **options: Any) -> list[Case]:
    task = {"method": "load_model", **task}
    packed = {**task, "keywords": {"quantization": "int8"}}
    return [
        Case(f"bf16, {where}", "limit", folder, task, **options),
        Case(f"int8, {where}", "ours", folder, packed, **options),
    ]


def cloud_pair(bench: Bench, args: argparse.Namespace, endpoint: str) -> list[Case]:
    gigabytes = QUANTIZED_READERS * args.megabytes_per_stream / 1000
    folder = make_once(bench.work / "gcs" / "models", gigabytes, "dense", "bf16", 1)

    def gs() -> AbstractContextManager[Path | str]:
        return nullcontext(f"gs://models/{folder.name}")

    task = {"options": {"readers": QUANTIZED_READERS}}
    return pair_of_loads(f"gs://, {QUANTIZED_READERS} readers", folder, task, at=gs, env=client_env(endpoint))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pair(cases: list[Case], results: dict[str, list[Row]]) -> list[tuple[Case, list[Row]]]:
    return [(case, results[case.name]) for case in cases]


def with_fraction(rows: list[Row], limit: float) -> list[Row]:
    return [{**row, "fraction": round(row["gb_s"] / limit, 3)} if "gb_s" in row else row for row in rows]


def warn(rows: list[Row], is_wrong: Callable[[float], bool], text: str) -> None:
    for row in rows:
        if "from_storage" in row and is_wrong(row["from_storage"]):
            print(f"warning: {row['name']}: {row['from_storage']:.0%} came from storage; it {text}", file=sys.stderr)


FIGURES = {1: page_cache, 2: cold_files, 3: cloud_storage, 4: host_memory, 5: quantized}
COLUMNS = {
    "gb_s": "GB/s",
    "fraction": "of the limit",
    "over_safetensors": "x safetensors",
    "time_ratio": "x the time",
    "streams": "streams at once",
    "limit_mib": "limit, MiB",
    "rss_above_mib": "RSS above, MiB",
    "group_above_mib": "cgroup above, MiB",
    "group_peak_by": "cgroup's peak by",
}


def show(figure: Figure) -> None:
    """The limit first, then a table."""
    print(f"\nFigure {figure.number}: {figure.title}\nceiling: {figure.limit}\n")
    columns = [key for key in COLUMNS if any(key in row for row in figure.rows)]
    print(f"| {'':36} |" + "|".join(f" {COLUMNS[key]:>17} " for key in columns) + "|")
    print(f"|{'-' * 38}|" + "|".join("-" * 19 for _ in columns) + "|")
    for row in figure.rows:
        cells = "|".join(f" {row[key] if row.get(key) is not None else '-':>17} " for key in columns)
        print(f"| {row['name']:36} |{cells}| {row.get('note', '')}".rstrip())


def plot(figure: Figure, folder: Path) -> None:
    rows = [row for row in figure.rows if figure.value in row and row["name"] != MAPPED]
    bars = [(row["kind"], row["name"], row[figure.value]) for row in rows]
    plot_bars(figure.title, figure.unit, bars, figure.line, folder / f"loading_figure{figure.number}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints, on the disk to measure")
    parser.add_argument("--figure", type=int, nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoints of figures 1, 2, 4 and 5")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has the peers' packages")
    parser.add_argument("--scale", type=float, default=10.0, help="figures 3, 5: 200 MB/s a stream are divided by it")
    parser.add_argument("--latency", type=float, default=0.045, help="figures 3, 5: seconds to the first byte")
    parser.add_argument("--megabytes-per-stream", type=float, default=128.0, help="figures 3, 5: bytes for each reader")
    parser.add_argument("--without-peers", action="store_true", help="figure 3: only ours and raw reads")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one load")
    parser.add_argument("--plot", type=Path, help="folder for one SVG a figure")
    args = parser.parse_args()
    bench = Bench(args.work, args.repeats, args.shards, args.peer_python, args.timeout)
    figures = []
    for number in args.figure:
        figures.append(FIGURES[number](bench, args))
        show(figures[-1])
        if args.plot:
            plot(figures[-1], args.plot)
    found = [{"figure": figure.number, "limit": figure.limit, "rows": figure.rows} for figure in figures]
    print(json.dumps({"benchmark": "loading", "repeats": args.repeats, "cores": os.cpu_count(), "figures": found}))


if __name__ == "__main__":
    main()
