"""Every exception that torchinfer raises on purpose.

    TorchinferError
    ├── ConfigError        an option of EngineConfig or of the command line cannot be honoured
    ├── CheckpointError    the checkpoint's files are missing, damaged or do not fit together
    │   └── UnsupportedModelError   the files are fine, but this library cannot compute the model
    ├── RequestError       a request asks for something that cannot be honoured
    ├── OverloadedError    the queue is full; the same request may succeed later
    ├── DeviceError        a device is not there, or its memory does not suffice
    │   └── StepMemoryError   it does not suffice for one step: that step's requests have been ended
    └── EngineError        a step failed or the engine is closed; open requests have been ended

    try:
        llm = torchinfer.LLM("path/to/checkpoint")
    except torchinfer.TorchinferError as error:
        print(error)

Each message holds the value found, the rule, and what to do.
"""


class TorchinferError(Exception):
    """Base of all errors that a user, a file, a client or a machine can cause."""


class ConfigError(TorchinferError, ValueError):
    """An option cannot be honoured."""


class CheckpointError(TorchinferError):
    """A checkpoint is missing, damaged, or does not fit its own config."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint asks for a computation that this library does not have."""


class RequestError(TorchinferError, ValueError):
    """A request asks for something that cannot be honoured; other requests are not touched."""


class OverloadedError(TorchinferError):
    """The queue is full. `retry_after_seconds` estimates when the next request will have ended."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeviceError(TorchinferError):
    """A device is not there, or its memory does not suffice."""


class StepMemoryError(DeviceError):
    """A step did not fit into the device's memory. Its requests end with an error, the engine goes on."""


class EngineError(TorchinferError):
    """The engine stopped: a step failed or it was closed."""


def raise_all(problems: list[str], kind: type[TorchinferError], heading: str) -> None:
    """Raise `kind` with every problem on its own line; do nothing when there is none."""
    if len(problems) == 1:
        raise kind(f"{heading}: {problems[0]}")
    if problems:
        raise kind(f"{heading}:\n" + "\n".join(f"  - {problem}" for problem in problems))
