"""lm-evaluation-harness's own command with the model `torchinfer` in its registry:

    python -m torchinfer.evaluation.lm_eval run --model torchinfer --model_args pretrained=DIR,dtype=float32 --tasks ...

The harness looks for no plug-ins, so a program that registers the model has to start it.
"""

from __future__ import annotations

from torchinfer.errors import ConfigError

MODEL = "torchinfer"
TARGET = "torchinfer.evaluation.harness:HarnessModel"


def register() -> None:
    """Make the model known to the harness in this process; again does no harm.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  (fills the registry, which is done only while that is empty)
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'torchinfer[eval]'") from error
    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)


def main() -> None:
    """The harness's command line."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
