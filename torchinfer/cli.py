"""The `torchinfer` command: generate, serve, client, inspect, doctor, plan, quantize, eval.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 Ctrl-C.
Whatever takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchinfer.cli_flags import ENGINE, SAMPLING, SCHEME_HELP, SERVER
from torchinfer.config import EngineConfig
from torchinfer.console import show
from torchinfer.errors import ConfigError, TorchinferError
from torchinfer.evaluation import options as evaluation
from torchinfer.flags import quantization
from torchinfer.planner import options as planner
from torchinfer.request import SamplingParams
from torchinfer.serving.options import ServerOptions

GENERATE_EXAMPLES = """examples:
  torchinfer generate --model path/to/checkpoint --prompt "The capital of France is" --max-tokens 20 --temperature 0
  torchinfer generate --model path/to/checkpoint --chat --prompt "Name three rivers." --device cpu --dtype float32
  torchinfer generate --model path/to/checkpoint --prompt-file question.txt --n 3 --json | jq .text"""

SERVE_EXAMPLES = """examples:
  torchinfer serve --model path/to/checkpoint
  torchinfer serve --model path/to/checkpoint --quantization int8
  torchinfer serve --model path/to/checkpoint --port 9001 --max-concurrent 128 --max-queue 256
  torchinfer serve --model path/to/checkpoint --tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem

The gRPC services are torchinfer.v1.Inference, grpc.health.v1.Health and reflection. SIGTERM or Ctrl-C lets open
requests end, for --drain-seconds; a second one stops at once."""

CLIENT_EXAMPLES = """examples:
  torchinfer client --target localhost:9000 --prompt "The capital of France is" --max-tokens 20
  torchinfer client --target example.org:443 --tls --chat --prompt "Name three rivers." --json"""

INSPECT_EXAMPLES = """examples:
  torchinfer inspect path/to/checkpoint
  torchinfer inspect path/to/checkpoint --json | jq

Exits with 1 when the checkpoint cannot be served as it is."""

DOCTOR_EXAMPLES = """examples:
  torchinfer doctor path/to/checkpoint
  torchinfer doctor gs://bucket/checkpoint --seconds 10
  torchinfer doctor path/to/checkpoint --json | jq .advice

Reads parts of the files, and drops them from the page cache before."""

QUANTIZE_EXAMPLES = """examples:
  torchinfer quantize path/to/checkpoint path/to/new --scheme int8
  torchinfer quantize gs://bucket/checkpoint new --scheme 'model.layers.*.mlp.*=int4' --scheme int8
  torchinfer quantize path/to/checkpoint path/to/new --scheme int8_w8a8 --calibrate text.txt

Writes the compressed-tensors format, which transformers and other programs read too. What was stopped goes on when the
same command is given again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = build_parser().parse_args(argv, argparse.Namespace(argv=sys.argv[1:] if argv is None else argv))
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("torchinfer").setLevel(arguments.log_level.upper())
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\ntorchinfer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"torchinfer: error: {_message(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="torchinfer", description="Inference for PyTorch models on TPU, GPU and CPU.")
    parser.add_argument("--version", action="version", version=f"torchinfer {version('torchinfer')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_serve(commands)
    _add_client(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_quantize(commands)
    _add_eval(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", "complete prompts in this process", GENERATE_EXAMPLES)
    parser.usage = "torchinfer generate --model DIR --prompt TEXT [options]"
    _add_prompts(parser)
    SAMPLING.add_to(parser)
    ENGINE.add_to(parser)
    parser.set_defaults(run=_generate)


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", "serve a model over gRPC", SERVE_EXAMPLES, log_level="info")
    parser.usage = "torchinfer serve --model DIR [options]"
    SERVER.add_to(parser)
    ENGINE.add_to(parser)
    parser.set_defaults(run=_serve)


def _add_client(commands: Any) -> None:
    parser = _command(commands, "client", "complete prompts on a server", CLIENT_EXAMPLES)
    parser.usage = "torchinfer client --target HOST:PORT --prompt TEXT [options]"
    _add_prompts(parser)
    group = parser.add_argument_group("connection")
    group.add_argument("--target", required=True, metavar="HOST:PORT", help="the server")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="for each prompt (default: none)")
    group.add_argument("--tls", action="store_true", help="use TLS, with the usual roots if --tls-ca is not given")
    group.add_argument("--tls-ca", metavar="PATH", help="PEM file with the roots to trust")
    group.add_argument("--tls-cert", metavar="PATH", help="PEM file with a client certificate")
    group.add_argument("--tls-key", metavar="PATH", help="PEM file with its key")
    SAMPLING.add_to(parser)
    parser.set_defaults(run=_client)


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", "tell what a checkpoint holds and needs", INSPECT_EXAMPLES)
    parser.add_argument("model", metavar="DIR", help="folder of a Hugging Face checkpoint, or gs://bucket/prefix")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=_inspect)


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", "measure where a checkpoint lies and tell what to change", DOCTOR_EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="folder with a file of at least 1 MiB, or gs://bucket/prefix")
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="X", help="at most, for each of six measurements (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=_doctor)


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", "tell which accelerator a model fits, and how fast it may be", planner.EXAMPLES)
    parser.usage = "torchinfer plan --model DIR_OR_CONFIG [options]"
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    planner.PLAN.add_to(parser)
    parser.set_defaults(run=_plan)


def _add_quantize(commands: Any) -> None:
    parser = _command(commands, "quantize", "write a quantized copy of a checkpoint", QUANTIZE_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, or gs://bucket/prefix")
    parser.add_argument("output", metavar="OUT", help="folder to create; until all is there it is OUT.partial")
    parser.add_argument(
        "--scheme",
        action="append",
        required=True,
        metavar="[PATTERN=]SCHEME",
        help=SCHEME_HELP,
    )
    names = ("calibration", "load_memory", "load_readers", "load_direct", "verify", "progress")
    ENGINE.add_to(parser, names)
    parser.set_defaults(run=_quantize)


def _add_eval(commands: Any) -> None:
    parser = _command(commands, "eval", "measure what quantization costs, on a text", evaluation.EXAMPLES)
    parser.usage = "torchinfer eval --model DIR --text FILE [options]"
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    evaluation.EVALUATION.add_to(parser)
    parser.set_defaults(run=_eval)


def _command(
    commands: Any, name: str, summary: str, examples: str, log_level: str = "warning"
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default=log_level, help=f"(default: {log_level})")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(usage_error=parser.error)
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts", "at least one; all are answered in order")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="one prompt, - is standard input; repeatable"
    )
    group.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message in the model's chat template"
    )
    group.add_argument("--json", action="store_true", help="one JSON object a sample, on its own line")


def _generate(arguments: argparse.Namespace) -> int:
    params = SamplingParams(**SAMPLING.values(arguments))
    config = EngineConfig(**ENGINE.values(arguments))
    prompts = _prompts(arguments)
    from torchinfer.llm import LLM

    with LLM(**asdict(config)) as llm:
        inputs: list[str | Sequence[int]] = list(prompts)
        if arguments.chat:
            if llm.tokenizer is None:
                raise ConfigError("--chat needs a model with a tokenizer, this one has none")
            inputs = [llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in prompts]
        streams = [llm.stream(prompt, params) for prompt in inputs]  # all run together, the first is shown live
        show(prompts, streams, params.n, arguments.json)
    return 0


def _client(arguments: argparse.Namespace) -> int:
    params = SamplingParams(**SAMPLING.values(arguments))
    prompts = _prompts(arguments)
    _require_grpc()
    from torchinfer.serving.client import Client

    tls = {name: getattr(arguments, name) for name in ("tls", "tls_ca", "tls_cert", "tls_key")}
    with Client(arguments.target, **tls) as client:
        inputs = [[{"role": "user", "content": text}] if arguments.chat else text for text in prompts]
        streams = (client.generate(prompt, params, timeout=arguments.timeout) for prompt in inputs)
        show(prompts, streams, params.n, arguments.json)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    config = EngineConfig(**ENGINE.values(arguments))
    options = ServerOptions(**SERVER.values(arguments))
    _require_grpc()
    from torchinfer.serving.main import run_server

    return run_server(config, options)


def _inspect(arguments: argparse.Namespace) -> int:
    from torchinfer.loader.inspect import inspect

    inspection = inspect(arguments.model)
    print(json.dumps(inspection.to_dict(), indent=2) if arguments.json else inspection.to_text())
    return 0 if inspection.is_usable else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from torchinfer.loader.doctor import diagnose

    diagnosis = diagnose(arguments.path, arguments.seconds)
    print(json.dumps(diagnosis.to_dict(), indent=2) if arguments.json else diagnosis.to_text())
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    options = planner.PlanOptions(**planner.PLAN.values(arguments))
    from torchinfer.planner.chart import write_chart
    from torchinfer.planner.compiled import compile_steps
    from torchinfer.planner.planner import plan
    from torchinfer.planner.table import to_dict, to_text

    found = plan(options)
    compiled = compile_steps(found, options) if options.compile else []
    if options.plot is not None:
        write_chart(found, options.plot)
    print(json.dumps(to_dict(found, compiled), indent=2) if arguments.json else to_text(found, compiled))
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    config = EngineConfig(
        model=arguments.model, quantization=quantization(arguments.scheme), **ENGINE.values(arguments)
    )
    from torchinfer.loader import LoadOptions
    from torchinfer.writer.folder import partial_path
    from torchinfer.writer.quantize import quantize_checkpoint

    options = LoadOptions(config.load_memory, config.load_readers, config.load_direct, config.verify)
    assert config.quantization is not None
    try:
        report = quantize_checkpoint(
            config.model,
            arguments.output,
            config.quantization,
            calibration=config.calibration,
            options=options,
            progress=config.progress,
        )
    except KeyboardInterrupt:
        partial = partial_path(Path(arguments.output))
        if partial.is_dir():
            print(f"\nwhat is complete is in {partial}; give the same command to go on", file=sys.stderr)
        raise
    print(report)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    options = evaluation.EvaluationOptions(**evaluation.EVALUATION.values(arguments))
    from torchinfer.evaluation.evaluate import evaluate
    from torchinfer.evaluation.report import write_report
    from torchinfer.evaluation.table import to_text

    found = evaluate(options)
    if options.report is not None:
        write_report(found, shlex.join(["torchinfer", *arguments.argv]), options.report)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else to_text(found))
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(arguments.prompt)
    for name in arguments.prompt_file:
        try:
            prompts.append(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --prompt-file {name}: {error}; it must be a text file in UTF-8") from error
    if not prompts:
        arguments.usage_error("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    return prompts


def _require_grpc() -> None:
    for name in ("grpc", "grpc_health", "grpc_reflection", "google.protobuf", "google.rpc"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; pip install torchinfer[serving]") from error


def _message(error: Exception) -> str:
    if isinstance(error, TorchinferError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
