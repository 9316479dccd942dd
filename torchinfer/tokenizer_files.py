"""The tokenizer of a checkpoint, wherever that lies. transformers reads local files only, and would wait for a mount as
long as that hangs: from network storage the files are copied first, by the loader's readers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchinfer.loader.stall import read_file
from torchinfer.loader.storage import list_source
from torchinfer.tokenizer import Tokenizer

SUFFIXES = (".json", ".model", ".txt", ".jinja")
INDEX_SUFFIX = ".index.json"  # names of tensors, nothing for a tokenizer
MAX_BYTES = 200_000_000  # of one file


def load_tokenizer(model: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder or of gs://bucket/prefix; None where there are no tokenizer files.

    Raises:
        CheckpointError: there is no such folder, the files cannot be read, or they make no fast tokenizer.
        StalledError: the storage hangs.
    """
    source, names = list_source(model)
    if not source.is_network:
        return Tokenizer.from_folder(model)
    with tempfile.TemporaryDirectory(prefix="torchinfer-tokenizer-") as folder:
        for name in names:
            if name.endswith(SUFFIXES) and not name.endswith(INDEX_SUFFIX):
                (Path(folder) / name).write_bytes(read_file(source, name, MAX_BYTES))
        return Tokenizer.from_folder(folder, address=source.address)
