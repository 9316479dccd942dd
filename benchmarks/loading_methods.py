"""One load of one checkpoint in this process, timed inside: the child of benchmarks/loading.py.

    python benchmarks/loading_methods.py '{"method": "ours", "path": "DIR", "files": ["DIR/model.safetensors"]}'

Prints one JSON line. A method imports what it needs, then returns the function that is timed; what that returns is
kept until the bytes are counted. The peers give a dict of CPU tensors which own their memory, unless the name says
`mapped`.
"""

from __future__ import annotations

import dataclasses
import http.client
import importlib
import importlib.metadata
import inspect
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from loading_memory import MemoryWatch

Load = Callable[[], int]  # returns the bytes of what was loaded
Task = dict[str, Any]
STEP = 8 << 20  # bytes of one read
PAGE = 4096


class Missing(Exception):
    """The package is not there, or too old for this method."""


def require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"{name} is not installed") from error


# What we measure ourselves against: reads without a loader.


def pread(task: Task) -> Load:
    """Parallel reads into memory of the files' size. memory: fresh (page faults included), huge (fresh, in pages of
    2 MiB where the system gives them), reused."""
    sizes = [os.path.getsize(file) for file in task["files"]]
    room = sum(-(-size // PAGE) * PAGE for size in sizes)

    def load() -> int:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if task["memory"] == "huge":
            memory.madvise(mmap.MADV_HUGEPAGE)
        read_all(task, memoryview(memory))
        return sum(sizes)

    def again() -> int:
        read_all(task, kept)
        return sum(sizes)

    if task["memory"] != "reused":
        return load
    kept = memoryview(mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    read_all(task, kept)
    return again


def disk(task: Task) -> Load:
    """The storage's own sequential rate: O_DIRECT into one small buffer a thread."""

    def load() -> int:
        read_all(task, None)
        return sum(os.path.getsize(file) for file in task["files"])

    return load


def raw_http(task: Task) -> Load:
    """What the server of gs:// gives to so many streams; each reads a contiguous part of the files."""
    total, threads = sum(task["sizes"]), task["threads"]
    return lambda: sum(in_threads(lambda i: http_part(task, total * i // threads, total * (i + 1) // threads), threads))


def http_part(task: Task, first: int, last: int) -> int:
    """The bytes [first, last) of all files in a row, into one small buffer."""
    connection = http.client.HTTPConnection(urlsplit(os.environ["STORAGE_EMULATOR_HOST"]).netloc)
    buffer, done, start = bytearray(STEP), 0, 0
    for file, size in zip(task["files"], task["sizes"], strict=True):
        begin, end = max(first - start, 0), min(last - start, size)
        start += size
        if begin >= end:
            continue
        bucket, _, name = file.removeprefix("gs://").partition("/")
        path = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media"
        connection.request("GET", path, headers={"Range": f"bytes={begin}-{end - 1}"})
        answer = connection.getresponse()
        while count := answer.readinto(buffer):
            done += count
    return done


def read_all(task: Task, memory: memoryview | None) -> None:
    """Each of `threads` reads a contiguous part of the files forward, through descriptors of its own."""
    blocks: list[tuple[str, int, int, int]] = []  # file, offset in it, bytes, place in memory
    start = 0
    for file in task["files"]:
        size = os.path.getsize(file)
        blocks += [(file, offset, min(STEP, size - offset), start + offset) for offset in range(0, size, STEP)]
        start += -(-size // PAGE) * PAGE
    count = task["threads"]
    in_threads(lambda i: read_blocks(blocks[len(blocks) * i // count : len(blocks) * (i + 1) // count], memory), count)


def in_threads(work: Callable[[int], int], count: int) -> list[int]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def read_blocks(blocks: list[tuple[str, int, int, int]], memory: memoryview | None) -> int:
    flags = os.O_RDONLY if memory else os.O_RDONLY | os.O_DIRECT
    buffer = memory or memoryview(mmap.mmap(-1, STEP))
    opened, descriptor, total = "", -1, 0
    for file, offset, size, place in blocks:
        if file != opened:
            if opened:
                os.close(descriptor)
            opened, descriptor = file, os.open(file, flags)
        done = 0
        while done < size:
            target = buffer[place + done : place + size] if memory else buffer[done:]
            count = os.preadv(descriptor, [target], offset + done)
            if not count:
                raise OSError(f"{file} ends at {offset + done}")
            done += count
        total += done
    if opened:
        os.close(descriptor)
    return total


# The loaders.


def ours(task: Task) -> Load:
    torch, loader = require("torch"), require("torchinfer.loader.weights")
    checkpoint, config = require("torchinfer.loader"), require("torchinfer.models.config")
    models = require("torchinfer.models")
    if task["path"].startswith("gs://"):
        require("gcsfs.core")  # or its import would be timed
    options = checkpoint.LoadOptions(**task.get("options", {}))

    def load() -> int:
        opened = checkpoint.Checkpoint.open(task["path"])
        with torch.device("meta"):
            model = models.build_model(config.ModelConfig.from_dict(opened.config))
        dtype = getattr(torch, task.get("dtype", "bfloat16"))
        report = loader.load_weights(model, opened, dtype, torch.device("cpu"), False, options)
        task["report"] = dataclasses.asdict(report)
        task["kept"] = model
        return sum(tensor.nbytes for tensor in model.state_dict().values())

    return load


def load_model(task: Task) -> Load:
    """As a program calls it, with `keywords`. The bytes are those of the files, whatever becomes of them."""
    torch, loader, config = require("torch"), require("torchinfer.loader"), require("torchinfer.models.config")
    if task["path"].startswith("gs://"):
        require("gcsfs.core")
    dtype, device = getattr(torch, task.get("dtype", "bfloat16")), torch.device("cpu")
    options, keywords = loader.LoadOptions(**task.get("options", {})), task.get("keywords", {})

    def load() -> int:
        opened = loader.Checkpoint.open(task["path"])
        model_config = config.ModelConfig.from_dict(opened.config)
        task["kept"] = loader.load_model(opened, model_config, dtype, device, options=options, **keywords)
        return sum(task["sizes"])

    return load


def safetensors_mapped(task: Task) -> Load:
    return safetensors(task, lambda load_file, file: load_file(file))


def safetensors_cloned(task: Task) -> Load:
    def load(load_file: Any, file: str) -> Any:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}

    return safetensors(task, load)


def safetensors_pread(task: Task) -> Load:
    if "backend" not in inspect.signature(require("safetensors.torch").load_file).parameters:
        raise Missing("this safetensors has no backend='pread'")
    return safetensors(task, lambda load_file, file: load_file(file, backend="pread"))


def safetensors(task: Task, load_one: Callable[[Any, str], Any]) -> Load:
    load_file = require("safetensors.torch").load_file

    def load() -> int:
        tensors: dict[str, Any] = {}
        for file in task["files"]:
            tensors |= load_one(load_file, file)
        return keep(task, tensors)

    return load


def runai(task: Task) -> Load:
    if "readers" in task:
        for name in ("RUNAI_STREAMER_CONCURRENCY", "RUNAI_STREAMER_OBJ_CONCURRENCY"):
            os.environ[name] = str(task["readers"])
    streamer = require("runai_model_streamer").SafetensorsStreamer
    is_owned = "owned" in inspect.signature(streamer.stream_files).parameters  # before, tensors were views

    def load() -> int:
        with streamer() as stream:
            stream.stream_files(task["files"])
            tensors = {name: tensor if is_owned else tensor.clone() for name, tensor in stream.get_tensors()}
        return keep(task, tensors)

    return load


def fastsafetensors(task: Task) -> Load:
    loader_class = require("fastsafetensors").SafeTensorsFileLoader

    def load() -> int:
        loader = loader_class(None, device="cpu", nogds=True)
        loader.add_filenames({0: task["files"]})
        buffers = loader.copy_files_to_device()
        task["buffers"] = buffers
        return keep(task, {name: buffers.get_tensor(name) for name in loader.get_keys()})

    return load


def transformers(task: Task) -> Load:
    auto = require("transformers").AutoModelForCausalLM

    def load() -> int:
        return keep(task, auto.from_pretrained(task["path"], dtype="auto").state_dict())

    return load


def keep(task: Task, tensors: dict[str, Any]) -> int:
    task["kept"] = tensors
    return sum(tensor.nbytes for tensor in tensors.values())


METHODS: dict[str, Callable[[Task], Load]] = {
    "pread": pread,
    "disk": disk,
    "raw http": raw_http,
    "ours": ours,
    "load_model": load_model,
    "safetensors mapped": safetensors_mapped,
    "safetensors cloned": safetensors_cloned,
    "safetensors pread": safetensors_pread,
    "runai": runai,
    "fastsafetensors": fastsafetensors,
    "transformers": transformers,
}
PACKAGES = {
    "safetensors": "safetensors",
    "runai": "runai-model-streamer",
    "fastsafetensors": "fastsafetensors",
    "transformers": "transformers",
}


# Measuring.


def storage_bytes() -> int:
    """What this process has caused to be fetched from storage."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def drop_from_cache(files: list[str]) -> None:
    """The files only: to drop all that the system caches would make the loaders wait for their own code too."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def settle(num_bytes: int) -> None:
    """Touch so much memory and give it back. A hypervisor backs the memory of a virtual machine when it is touched,
    and takes back what stays free: whoever came first would pay for those who follow."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, num_bytes, PAGE):
            memory[offset] = 1


def measure(task: Task) -> dict[str, Any]:
    """Seconds, bytes of the result, bytes that came from storage, the package's version, our own report."""
    load = METHODS[task["method"]](task)
    if task.get("is_cold"):
        drop_from_cache(task["files"])
    if task.get("is_settled"):
        settle(sum(task["sizes"]) * 21 // 20)
    watch = MemoryWatch() if task.get("is_watched") else None
    fetched, start = storage_bytes(), time.perf_counter()
    num_bytes = load()
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "num_bytes": num_bytes}
    result["storage_bytes"] = storage_bytes() - fetched
    if watch is not None:
        result["memory"], result["group_peak_by"] = watch.stop(), watch.how
        result["held_bytes"] = sum(tensor.nbytes for tensor in task["kept"].state_dict().values())
    package = PACKAGES.get(task["method"].split()[0])
    if package is not None:
        result["version"] = importlib.metadata.version(package)
    if "report" in task:
        result["report"] = task["report"]
    return result


def main() -> None:
    task = json.loads(sys.argv[1])
    try:
        result = measure(task)
    except Missing as error:
        result = {"missing": str(error)}
    print(json.dumps(result), flush=True)
    os._exit(0)  # taking gigabytes apart tensor by tensor measures nothing


if __name__ == "__main__":
    main()
