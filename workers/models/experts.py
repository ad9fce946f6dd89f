"""A layer of experts: a router sends each row to some of many small MLPs (LLaDA-MoE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remask.workers.models.config import ExpertsConfig
from remask.workers.models.row_ops import RowOps


def empty_parameter(*shape: int) -> nn.Parameter:
    """A weight that has not been loaded, on the meta device."""
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


class Experts(nn.Module):
    """The MLP of a layer.

    Args:
        config: numbers and sizes of the experts.
        hidden_size: D.
    """

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_active = config.num_active
        self.router = empty_parameter(config.count, hidden_size)
        self.gate_up = empty_parameter(config.count, 2 * config.size, hidden_size)
        self.down = empty_parameter(config.count, hidden_size, config.size)
        self.shared_gate_up = self.shared_down = None
        if config.shared_size is not None:
            self.shared_gate_up = empty_parameter(2 * config.shared_size, hidden_size)
            self.shared_down = empty_parameter(hidden_size, config.shared_size)

    def forward(self, x_TD: Tensor, ops: RowOps) -> Tensor:
        """Output [T, D] for normalised rows [T, D]."""
        # The weights of a row's experts do not add up to 1.
        probabilities_TE = ops.linear(x_TD, self.router).float().softmax(-1)
        weights_TK, chosen_TK = probabilities_TE.topk(self.num_active, dim=-1)
        out = ops.experts(x_TD, weights_TK.to(x_TD.dtype), chosen_TK, self.gate_up, self.down)
        if self.shared_gate_up is not None and self.shared_down is not None:
            out += ops.linear(ops.silu_mul(ops.linear(x_TD, self.shared_gate_up)), self.shared_down)
        return out
