"""A model as its config.json describes it: no weights are read, none are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchinfer.config import Quantization
from torchinfer.device import dtype_name
from torchinfer.errors import CheckpointError, ConfigError, raise_all
from torchinfer.loader.checkpoint import CONFIG, MAX_JSON_BYTES, QUANTIZATION_KEYS, Checkpoint, scan
from torchinfer.loader.header import TensorEntry, parse_json
from torchinfer.loader.published import plan_published
from torchinfer.loader.schemes import HEAD, quantize_model
from torchinfer.loader.stall import read_file, unless_stalled
from torchinfer.loader.storage import list_source, open_source
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import with_expert_parallel
from torchinfer.startup import resolve_dtype

HOST = torch.device("cpu")
# Of checkpoints that come quantized the headers tell which layers are not. Without them: the head, as is usual.
UNREAD = {f"{HEAD}.weight": TensorEntry(f"{HEAD}.weight", torch.bfloat16, (), "", 0, 0)}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is known of a model before it is loaded."""

    name: str
    config: ModelConfig
    dtype: torch.dtype
    quantization: Quantization | None  # asked for; None: as the checkpoint has it
    checkpoint: Checkpoint  # its tensors are UNREAD where there is only a config.json

    @property
    def scheme(self) -> str:
        """For people: what the weights are held in."""
        if self.checkpoint.quantization is not None:
            method = self.checkpoint.quantization
            return f"{method.get('quant_method') if isinstance(method, Mapping) else method}, as the checkpoint has it"
        if isinstance(self.quantization, Mapping):
            return ", ".join(f"{pattern}={scheme}" for pattern, scheme in self.quantization.items())
        return self.quantization or dtype_name(self.dtype)

    def build(self, config: ModelConfig) -> Decoder:
        """A model with these sizes on the meta device, its matrices held as the engine would hold them."""
        with torch.device("meta"):
            model = build_model(config)
        if self.quantization is not None:
            quantize_model(model, self.quantization, HOST)
            model.copy_table()
        elif self.checkpoint.quantization is not None:
            _, problems = plan_published(model, self.checkpoint)
            raise_all(problems, CheckpointError, f"{self.name} comes quantized")
        return model


def read_source(
    path: str | Path,
    dtype: str,
    quantization: Quantization | None,
    expert_parallel: bool = False,
    is_tpu: bool = False,
) -> ModelSource:
    """Read a folder's, a gs:// prefix's or a file's config.json. `expert_parallel`: see `with_expert_parallel`; `dtype`
    and `is_tpu`: see `resolve_dtype`.

    Raises:
        CheckpointError: there is none, or it is not JSON.
        UnsupportedModelError: with everything in it that this library cannot compute.
        ConfigError: `quantization` is asked of a model that comes quantized, `expert_parallel` of one without experts.
    """
    folder, _, name = str(path).rpartition("/")
    checkpoint = _read_file(folder or ".", name) if name.endswith(".json") else _read_folder(str(path))
    config = ModelConfig.from_dict(checkpoint.config)
    if quantization is not None and checkpoint.quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r}: the checkpoint comes quantized already (its quantization_config): leave "
            "the option out, or take the config.json of one that is not quantized"
        )
    if expert_parallel:
        config = with_expert_parallel(config)
    return ModelSource(_name(path), config, resolve_dtype(dtype, checkpoint.config, is_tpu), quantization, checkpoint)


def _read_folder(path: str) -> Checkpoint:
    if CONFIG not in list_source(path)[1]:
        raise CheckpointError(f"there is no {CONFIG} in {path!r}; pass a folder that has one, or the file itself")
    # Headers of tensors are read where there are any; that they are not, or not all, is no problem here.
    checkpoint, problems = scan(path)
    if not checkpoint.config:
        raise CheckpointError(f"{path!r}: {problems[0]}")
    return checkpoint if checkpoint.tensors else replace(checkpoint, tensors=UNREAD)


def _read_file(folder: str, name: str) -> Checkpoint:
    source = unless_stalled(f"open {folder}", lambda trial: open_source(folder))
    config = parse_json(read_file(source, name, MAX_JSON_BYTES), name)
    quantization = next((config[key] for key in QUANTIZATION_KEYS if config.get(key) is not None), None)
    return Checkpoint(source, config, {}, UNREAD, {}, False, quantization)


def _name(path: str | Path) -> str:
    """The folder's; of a file that is not config.json its own."""
    parts = [part for part in str(path).split("/") if part]
    if parts and parts[-1] == CONFIG:
        return parts[-2] if len(parts) > 1 else CONFIG
    return (parts or [CONFIG])[-1].removesuffix(".json")
