"""Packages of torchinfer. `kernels/` and `serving/` are top-level folders of the repository and subpackages of
`torchinfer` once installed: nothing else becomes importable."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

KERNEL_BACKENDS = ("reference", "cpu", "tpu", "cuda")
LIBRARY = "torchinfer.kernels.cpu.libtorchinfer_cpu"
package_dir = {f"torchinfer.kernels.{name}": f"kernels/{name}" for name in KERNEL_BACKENDS}
package_dir["torchinfer.serving"] = "serving"

SERVING = [
    "googleapis-common-protos>=1.70",
    "grpcio>=1.72.1",  # not older than grpcio-tools, which writes this minimum into the generated code
    "grpcio-health-checking>=1.72.1",
    "grpcio-reflection>=1.72.1",
    "protobuf>=6.30.0",  # 6 or 7: both run the code that this version generates
]
# And torchax==0.0.7, after them, over the older one that torch_xla's wheel has: scripts/install does.
XLA = ["torch==2.9.0", "torch_xla==2.9.0", "jax==0.7.1", "jaxlib==0.7.1"]
CUDA = ["triton>=3.5; sys_platform == 'linux'"]  # what torch's own wheels for CUDA bring
EVAL = ["lm-eval>=0.4.13"]  # brings datasets, pandas and scikit-learn, 0.5 GB, and leaves torch as it is
DEV = [
    *SERVING,
    *CUDA,  # its interpreter and its compiler need no GPU
    *EVAL,
    "accelerate>=1.0",  # for lm-eval's `hf` model, with which tests compare
    "compressed-tensors==0.15.0.1",  # the truth of its format in tests; later ones want torch 2.10
    "grpcio-tools==1.72.1",
    "hypothesis>=6.100",
    "mypy>=1.18",
    "psutil",  # compressed-tensors imports it without asking for it
    "pytest>=8.4",
    "pytest-xdist>=3.8",
    "ruff==0.17.5",
    "setuptools>=77",
    "types-protobuf",
    "wheel",
]


class BuildLibrary(build_ext):
    """Builds the CPU kernels with CMake. Where that fails the package works without them, and says so at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version: the library is loaded with ctypes and knows nothing of Python."""
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        """Raises CompileError, which setuptools turns into a warning because the extension is optional."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / "cpu"
        configure = ["cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(folder)]
        configure.append(f"-DTORCHINFER_OUTPUT={output}")
        if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the CPU kernels could not be built ({error}); PyTorch will compute instead") from error


class PlatformWheel(bdist_wheel):
    """One wheel for all versions of Python on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Interpreter, ABI, platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="torchinfer",
    version="0.1.0",
    description="Inference runtime for PyTorch models on TPU, GPU and CPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir=package_dir,
    packages=find_packages(include=["torchinfer", "torchinfer.*"]) + sorted(package_dir),
    package_data={
        "torchinfer": ["py.typed"],
        "torchinfer.planner": ["*.toml"],
        "torchinfer.kernels.cuda": ["tuned.json"],
        "torchinfer.serving": ["*.proto", "*.pyi"],
    },
    ext_modules=[Extension(LIBRARY, sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    install_requires=[
        "torch>=2.9",
        "transformers>=4.57,!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,!=5.4.*,!=5.5.*,!=5.6.*,!=5.7.*,!=5.8.*,!=5.9.*,!=5.10.0",
        "safetensors>=0.5",
        "gcsfs>=2025.2",
        "google-crc32c>=1.5",
        "numpy",
        "tqdm",
    ],
    extras_require={
        "serving": SERVING,
        "xla": XLA,
        "tpu": [*XLA, "libtpu==0.0.21"],
        "cuda": CUDA,
        "eval": EVAL,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["torchinfer=torchinfer.cli:main"]},
)
