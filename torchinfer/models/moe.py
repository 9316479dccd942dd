"""Mixture of experts: each token goes through the `top_k` feed-forward layers that its router prefers.

Two modes. dropless: every token is computed, whatever the load of its experts. capacity: an expert takes at most
ceil(top_k * tokens / experts * factor) tokens of a step; what overflows is dropped and counted (arXiv 2101.03961,
2006.16668). In both, tokens are sorted by expert and multiplied by `kernels.grouped_matmul`.

Letters: T tokens, E experts, F intermediate size, k = top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchinfer import kernels
from torchinfer.models.config import MoEConfig
from torchinfer.models.layers import GatedMLP, Layer, Linear, PreparedMatrix
from torchinfer.quantization.matrix import QuantizedMatrix
from torchinfer.quantized_weight import PreparedWeight


class Experts(Layer):
    """The experts' matrices, gate and up merged."""

    MATRICES = ("gate_up", "down")

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.slots = {"gate": slice(0, intermediate_size), "up": slice(intermediate_size, 2 * intermediate_size)}
        self.gate_up: nn.Parameter | QuantizedMatrix | PreparedMatrix | PreparedWeight
        self.down: nn.Parameter | QuantizedMatrix | PreparedMatrix | PreparedWeight
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size), requires_grad=False)
        self.activation = activation

    def forward(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        """[N, hidden] sorted by expert, [E] int32 -> [N, hidden]; rows past the sum of the sizes become zero."""
        gate_up = self.gate_up() if isinstance(self.gate_up, nn.Module) else self.gate_up
        down = self.down() if isinstance(self.down, nn.Module) else self.down
        inner = kernels.grouped_gated_matmul(x, gate_up, group_sizes, self.activation)
        return kernels.grouped_matmul(inner, down, group_sizes)


COUNTER = "num_dropped"  # the ends of the names of buffers that a forward pass writes to


class MoE(Layer):
    """Router, experts, and in some families an expert that sees every token.

    `num_dropped`, int64 on the device, counts what did not fit since the model was built: pairs of token and expert.
    `first_expert`, int32 [1]: of a chip that has those from there on; None where all are. Others' add nothing.
    """

    num_dropped: Tensor
    first_expert: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig, activation: str) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(hidden_size, config.num_experts, is_router=True)
        self.experts = Experts(config.num_experts_here, hidden_size, config.intermediate_size, activation)
        self.shared_expert: GatedMLP | None = None
        self.shared_gate: Linear | None = None
        if config.shared_intermediate_size is not None:
            self.shared_expert = GatedMLP(hidden_size, config.shared_intermediate_size, activation)
            self.shared_gate = Linear(hidden_size, 1, is_router=True)
        counter = torch.zeros((), dtype=torch.int64, device="cpu")
        self.register_buffer("num_dropped", counter, persistent=False)
        self.register_buffer("first_expert", None, persistent=False)

    def forward(self, x: Tensor, is_live: Tensor) -> Tensor:
        """[T, hidden], [T] bool: rows that are not padding -> [T, hidden]."""
        experts, weights = self._route(x, is_live)
        order = experts.flatten().argsort(stable=True)  # [T k]; dropped, padded and other chips' last
        group = torch.arange(self.config.num_experts_here, dtype=experts.dtype, device=experts.device)
        group_sizes = (experts.flatten() == group[:, None]).sum(1, dtype=torch.int32)
        computed = self.experts(x[order // self.config.top_k], group_sizes)
        # A gather by the inverse order: torch_xla 2.9 aborts on index_copy by the result of a sort.
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        by_token = computed[place].view(*experts.shape, -1)
        result = (by_token * weights[..., None]).sum(1)
        if self.shared_expert is None or self.shared_gate is None:
            return result
        return result + torch.sigmoid(self.shared_gate(x)) * self.shared_expert(x)

    def _route(self, x: Tensor, is_live: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden], [T] bool -> experts of this chip [T, k] int64, where E stands for none, and weights [T, k]."""
        scores = functional.softmax(self.router(x), dim=-1, dtype=torch.float32)
        weights, experts = scores.topk(self.config.top_k, dim=-1)
        if self.config.is_normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        is_kept = is_live[:, None]
        if self.config.mode == "capacity":
            is_kept = is_kept & self._fits(experts, is_live)
        num_here = self.config.num_experts_here
        if self.first_expert is not None:
            experts = experts - self.first_expert
            is_kept = is_kept & (experts >= 0) & (experts < num_here)
        return torch.where(is_kept, experts, num_here), weights.to(x.dtype)

    def _fits(self, experts: Tensor, is_live: Tensor) -> Tensor:
        """[T, k], [T] -> [T, k] bool: within its expert's capacity. First choices come first, then in token order."""
        num_experts, top_k = self.config.num_experts, self.config.top_k
        exact = is_live.sum() * (top_k * self.config.capacity_factor / num_experts)
        # A whole number must not round up because float32 holds it a little too large.
        capacity = torch.ceil(exact * (1 - 1e-6))
        is_chosen = functional.one_hot(experts, num_experts) * is_live[:, None, None]  # [T, k, E]
        in_order = is_chosen.transpose(0, 1).reshape(-1, num_experts)  # [k T, E]
        rank = ((in_order.cumsum(0) - 1) * in_order).sum(1).view(top_k, -1).T  # [T, k]
        fits = rank < capacity
        self.num_dropped.add_((~fits & is_live[:, None]).sum())
        return fits
