"""setuptools as the build backend; CMake and Ninja are asked for from PyPI only where the machine has none."""

import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

TOOLS = ("cmake", "ninja")
COMPILERS = ("c++", "g++", "clang++")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools needs, and the tools that are missing; without a compiler they would be of no use."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_tools()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_tools()]


def missing_tools() -> list[str]:
    """Packages to install for the time of the build."""
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        return []
    return [tool for tool in TOOLS if shutil.which(tool) is None]
