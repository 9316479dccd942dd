import grpc
import pytest

from torchinfer import errors
from torchinfer.serving.status import to_status


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RequestError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.ConfigError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.OverloadedError("x", 0.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.EngineError("x"), grpc.StatusCode.UNAVAILABLE),
        (errors.CheckpointError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.UnsupportedModelError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.DeviceError("x"), grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_code_of_each_error(error, code):
    assert (to_status(error).code, to_status(error).message) == (code, "x")


def test_every_error_of_ours_has_a_code():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TorchinferError)
    ]
    made = [kind("x", 1.0) if kind is errors.OverloadedError else kind("x") for kind in kinds]
    internal = [type(e) for e in made if to_status(e).code is grpc.StatusCode.INTERNAL]
    assert internal == [errors.TorchinferError]


def test_only_overload_has_a_retry_hint():
    assert dict(to_status(errors.OverloadedError("x", 0.5)).metadata)["retry-after-ms"] == "500"
    assert to_status(errors.EngineError("x")).metadata == ()
