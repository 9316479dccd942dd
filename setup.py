"""Packages of torchinfer. `kernels/` and `serving/` are top-level folders of the repository and subpackages of
`torchinfer` once installed: nothing else becomes importable."""

from pathlib import Path

from setuptools import find_packages, setup

KERNEL_BACKENDS = ("reference", "tpu")
package_dir = {f"torchinfer.kernels.{name}": f"kernels/{name}" for name in KERNEL_BACKENDS}
package_dir["torchinfer.serving"] = "serving"

SERVING = [
    "googleapis-common-protos>=1.70",
    "grpcio>=1.72.1",  # not older than grpcio-tools, which writes this minimum into the generated code
    "grpcio-health-checking>=1.72.1",
    "grpcio-reflection>=1.72.1",
    "protobuf>=6.30.0",  # 6 or 7: both run the code that this version generates
]
# And torchax==0.0.7, which pip must install without its dependencies: scripts/install does.
XLA = ["torch==2.9.0", "torch_xla==2.9.0", "jax==0.7.1", "jaxlib==0.7.1"]
DEV = [
    *SERVING,
    "compressed-tensors==0.15.0.1",  # reads back what is written; later ones need torch 2.10
    "grpcio-tools==1.72.1",
    "hypothesis>=6.100",
    "mypy>=1.18",
    "psutil",  # compressed-tensors imports it without asking for it
    "pytest>=8.4",
    "ruff==0.17.5",
    "setuptools>=77",
    "types-protobuf",
    "wheel",
]

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
    package_data={"torchinfer": ["py.typed"], "torchinfer.serving": ["*.proto", "*.pyi"]},
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
        "cuda": ["triton>=3.5"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["torchinfer=torchinfer.cli:main"]},
)
