"""The tokenizer of a checkpoint that may lie in Cloud Storage: transformers reads local files only."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchinfer.tokenizer import Tokenizer

SUFFIXES = (".json", ".model", ".txt", ".jinja")
INDEX_SUFFIX = ".index.json"  # names of tensors, nothing for a tokenizer
MAX_BYTES = 200_000_000  # of one file


def load_tokenizer(model: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder or of gs://bucket/prefix; None where there are no tokenizer files.

    Raises:
        CheckpointError: the files cannot be read, or make no fast tokenizer.
    """
    if not str(model).startswith("gs:/"):
        return Tokenizer.from_folder(model)
    from torchinfer.loader.stall import read_file  # with it comes torch, which a folder's tokenizer does not need
    from torchinfer.loader.storage import open_source

    source = open_source(model)
    with tempfile.TemporaryDirectory(prefix="torchinfer-tokenizer-") as folder:
        for name in source.names():
            if name.endswith(SUFFIXES) and not name.endswith(INDEX_SUFFIX):
                (Path(folder) / name).write_bytes(read_file(source, name, MAX_BYTES))
        return Tokenizer.from_folder(folder)
