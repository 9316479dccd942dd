"""Check that the installed package has its CPU library and that every level of this machine computes."""

import sys

import torch

from torchinfer import kernels
from torchinfer.kernels.cpu import library
from torchinfer.testing import assert_close


def main() -> int:
    """The exit code; an exception tells what is wrong."""
    opened = library.open_library()
    if opened is None:
        print("the package has no CPU library, or it cannot be loaded")
        return 1
    x, weight = torch.randn(3, 80), torch.randn(80)
    for level in library.levels(opened):
        library.choose_level(opened, level)
        assert_close(kernels.rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (80,), weight, 1e-6))
        print(f"{level}: computes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
