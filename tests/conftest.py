"""What all tests share: fixed seeds, and which tests need a device that is not here."""

import importlib.util
import os
import random
import shutil

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here. XLA has a CPU device, so only a missing torch_xla is a reason there."""
    missing = {
        "xla": None if importlib.util.find_spec("torch_xla") else "torch_xla is not installed",
        "cuda": None if torch.cuda.is_available() else "there is no CUDA device",
        "fuse": missing_for_fuse(),
    }
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
    return None


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
