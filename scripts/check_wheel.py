"""Check that a wheel holds one importable name and every part of the repository that belongs into it."""

import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"torchinfer": "torchinfer", "kernels": "torchinfer/kernels", "serving": "torchinfer/serving"}
SUFFIXES = {".py", ".pyi", ".proto", ".toml", ".typed", ".json"}
LIBRARY = "torchinfer/kernels/cpu/libtorchinfer_cpu.so"  # built with the wheel where there is a compiler


def main() -> int:
    """Print what is wrong with the wheel named on the command line; the exit code."""
    names = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
    expected = expected_names()
    problems = [f"outside of torchinfer/: {name}" for name in sorted(names) if not name.startswith("torchinfer/")]
    problems += [f"missing: {name}" for name in sorted(expected - names)]
    problems += [f"in the wheel, but not in the repository: {name}" for name in sorted(names - expected - {LIBRARY})]
    if LIBRARY not in names and any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        problems.append(f"missing, though there is a compiler: {LIBRARY}")
    if not any(name.startswith("torchinfer/kernels/reference/") for name in expected):
        problems.append("kernels/reference is not where it is expected: this check looks at nothing")
    print("\n".join(problems))
    return 1 if problems else 0


def expected_names() -> set[str]:
    """The wheel's names of all files in the folders that are packages."""
    files = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {"/".join((FOLDERS[file.parts[0]], *file.parts[1:])) for file in files if file.suffix in SUFFIXES}


if __name__ == "__main__":
    sys.exit(main())
