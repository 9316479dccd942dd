import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pinned():
    return (ROOT / "setup.py").read_text().split('"grpcio-tools==')[1].split('"')[0]


def installed():
    try:
        return version("grpcio-tools")
    except PackageNotFoundError:
        return None


def test_the_generated_code_imports_the_installed_name():
    text = (ROOT / "serving" / "inference_pb2_grpc.py").read_text()
    assert "from torchinfer.serving import inference_pb2" in text


def test_the_generated_code_is_of_the_pinned_version():
    text = (ROOT / "serving" / "inference_pb2_grpc.py").read_text()
    assert f"GRPC_GENERATED_VERSION = '{pinned()}'" in text


@pytest.mark.skipif(installed() != pinned(), reason="needs the grpcio-tools that setup.py pins")
def test_the_generated_code_is_what_the_proto_gives():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "scripts" / "generate_proto", "--check"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
