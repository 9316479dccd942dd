"""What all tests share: fixed seeds, and which tests need a device that is not here."""

import importlib.util
import os
import random
import shutil
import socket
import subprocess
import tempfile

import numpy as np
import pytest
import torch

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed jax would look for a TPU
os.environ.setdefault("PJRT_DEVICE", "CPU")  # torch_xla would take it too, with a line on stderr
# Programs are small: to compile them takes longer than to run them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, whose own functions look for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here. XLA has a CPU device, so only a missing torch_xla is a reason there."""
    missing = {
        "xla": None if importlib.util.find_spec("torch_xla") else "torch_xla is not installed",
        "libtpu": None if importlib.util.find_spec("libtpu") else "libtpu is not installed",
        "cuda": None if torch.cuda.is_available() else "there is no CUDA device",
    }
    if any(item.get_closest_marker("fuse") for item in items):
        missing["fuse"] = missing_for_fuse()
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def missing_for_fuse() -> str | None:
    """What mounts need and this machine lacks."""
    for program in ("fusermount3", "rclone"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    return why_not_mounted()


def why_not_mounted() -> str | None:
    """What a mount says that is tried, and undone at once. A container may show /dev/fuse and forbid to mount, and
    nothing but a mount tells. No file system answers behind it, so nobody may look into the folder.

    fusermount3 passes the descriptor of the mount on through a socket, whose number is in _FUSE_COMMFD.
    """
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as point, ours, theirs:
        number = theirs.fileno()
        command = ["fusermount3", "-o", "ro", "--", point]
        env = {**os.environ, "_FUSE_COMMFD": str(number)}
        tried = subprocess.run(command, env=env, pass_fds=[number], capture_output=True, text=True, timeout=10)
        if tried.returncode:
            return f"mounts are not permitted: {tried.stderr.strip()}"
        for descriptor in socket.recv_fds(ours, 1, maxfds=1)[1]:
            os.close(descriptor)  # ends the mount's connection, so that to undo it waits for nobody
        subprocess.run(["fusermount3", "-u", "-z", "--", point], check=True, timeout=10)
    return None


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
