"""What all models share: embedding, a stack of blocks, a final norm and the head that gives logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchinfer import kernels
from torchinfer.batch import Batch, KVCache
from torchinfer.models.block import Block
from torchinfer.models.config import ModelConfig
from torchinfer.models.layers import Embedding, Linear, is_prepared, prepare_matrices
from torchinfer.models.rope import Rope
from torchinfer.quantization import QuantizedMatrix, Scheme
from torchinfer.quantized_weight import PreparedWeight
from torchinfer.weight_map import Target

HEAD = "lm_head.weight"
ROWS_AT_ONCE = 4096  # of a table that is quantized


class Decoder(nn.Module):
    """A decoder whose subclass says which block it is made of and what the checkpoint calls its tensors.

    CHECKPOINT, IGNORED: see torchinfer/weight_map.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: Callable[[ModelConfig, int], nn.Module],
        norm: nn.Module,
        checkpoint: Mapping[str, Target],
        ignored: tuple[str, ...] = (),
        *,
        has_head_bias: bool = False,
        embedding_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = norm
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, has_head_bias)
        self.head_scheme: Scheme | None = None  # tied: of the copy that `copy_table` makes
        self.prepared_head: PreparedWeight | None = None
        self.gather: Callable[[Tensor], Tensor] | None = None  # a process's columns of logits -> those of all
        self.rope = Rope(config.rope)
        self.local_rope = Rope(config.local_rope) if config.local_rope is not None else None
        self.embedding_scale = embedding_scale
        # Some checkpoints hold the shared table twice.
        unused = (HEAD,) if config.tie_embeddings else ()
        self.CHECKPOINT = {name: target for name, target in checkpoint.items() if name not in unused}
        self.IGNORED = (*ignored, *unused)

    def forward(self, batch: Batch, kv_caches: list[KVCache], rows: Tensor | None = None) -> Tensor:
        """Final hidden states [T, hidden] of a step; kv_caches[layer] is written.

        rows: int [N], the tokens whose states are wanted: [N, hidden]. Behind the last layer's attention nothing is
        computed for the others.
        """
        rope = self.rope(batch)
        local_rope = rope if self.local_rope is None else self.local_rope(batch)
        x = self._embed(batch.tokens)
        moe = self.config.moe
        # Capacities are shares of all tokens of a step.
        of_last = rows if moe is None or moe.mode == "dropless" else None
        of_layers = [None] * (len(self.layers) - 1) + [of_last]
        for block, kv_cache, window, wanted in zip(self.layers, kv_caches, self.config.windows, of_layers, strict=True):
            x = block(x, rope if window is None else local_rope, kv_cache, batch, wanted)
        hidden: Tensor = self.norm(x if of_last is rows else x[rows])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] of forward's result -> [N, vocab] float32."""
        scores = kernels.linear(hidden, self.tied_head) if self.head is None else self.head(hidden)
        scores = scores.float() if self.gather is None else self.gather(scores).float()
        cap = self.config.logit_soft_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @property
    def tied_head(self) -> Tensor | PreparedWeight:
        """The head of a model that has no matrix for it: the table of embeddings, or what was prepared from it."""
        return self.embedding.weight if self.prepared_head is None else self.prepared_head

    def copy_table(self) -> None:
        """Once the table of embeddings is loaded: a copy of it in `head_scheme`, if there is one, becomes the head."""
        if self.head_scheme is None:
            return
        table = self.embedding.weight.data
        with torch.device("meta"):
            self.head = Linear(table.shape[1], table.shape[0])
        device, host = table.device, table.cpu() if table.device.type == "xla" else table
        with host.device:
            matrix = QuantizedMatrix(tuple(table.shape), self.head_scheme)
        for start in range(0, 0 if table.is_meta else len(table), ROWS_AT_ONCE):
            rows = host[start : start + ROWS_AT_ONCE]
            self.head_scheme.pack(rows, matrix.rows(start, len(rows)))
        del self.head.weight
        self.head.weight = matrix.to(device)

    def prepare(
        self,
        num_cores: int | None = None,
        settle: Callable[[nn.Module], None] | None = None,
        fuses: bool = True,
    ) -> None:
        """Bring the matrices into the layout of the device's kernels; their parameters are gone then. Fuse what it can.

        One matrix at a time is copied. A table that is also the head is read by rows too, so that its layout is a copy
        that stays: of a model of 0.5 billion parameters with 150,000 tokens a quarter of its memory.

        num_cores: of a TPU, see `kernels.prepare`. `settle` is called after each layer whose matrices may be new.
        fuses: not where modules are between that add something of their own, such as sums over several processes.
        """
        for module in self.modules():
            prepare_matrices(module, num_cores)
            if settle is not None and hasattr(module, "MATRICES"):
                settle(module)
        if self.head is None and self.prepared_head is None:
            self.prepared_head = kernels.prepare(self.embedding.weight.data, num_cores=num_cores)
        for block in self.layers if fuses else ():
            if isinstance(block, Block):
                block.fuse()

    def is_prepared(self) -> bool:
        """Whether all matrices are in the layout of the device's kernels."""
        return all(is_prepared(matrix) for matrix in self._matrices())

    def num_parameters(self) -> int:
        """Numbers that the model has learned, in however many bits they are held and in whatever layout; a head that
        is a copy of the table is none of them."""
        copy = 0 if self.head is None or self.head_scheme is None else self.embedding.weight.numel()
        matrices = [module for module in self.modules() if isinstance(module, QuantizedMatrix)]
        prepared = [matrix for matrix in self._matrices() if is_prepared(matrix)]
        total: int = sum(counted.numel() for counted in (*self.parameters(), *matrices, *prepared))
        return total - copy

    def _matrices(self) -> list[Any]:
        """Of all layers: a parameter, a QuantizedMatrix, or what the device's kernels made of them."""
        return [getattr(module, name) for module in self.modules() for name in getattr(module, "MATRICES", ())]

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if self.embedding_scale is None:
            return x
        # Rounded to the model's dtype first, as Gemma was trained.
        return x * torch.full((), self.embedding_scale, dtype=x.dtype, device=x.device)
