"""What all tests share: fixed seeds, and which tests need a device that is not here."""

import importlib.util
import random

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here. XLA has a CPU device, so only a missing torch_xla is a reason there."""
    missing = {
        "xla": None if importlib.util.find_spec("torch_xla") else "torch_xla is not installed",
        "cuda": None if torch.cuda.is_available() else "there is no CUDA device",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
