"""A layer of experts: a router sends each row to some of many small MLPs (LLaDA-MoE).

On a CPU an expert that has rows is one product, over a copy of its rows. The rows are taken in packs of
`PACK_ROWS`, so that the copies stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remask.workers.models.config import ExpertsConfig
from remask.workers.models.row_ops import RowOps

PACK_ROWS = 512


class Experts(nn.Module):
    """The MLP of a layer.

    Args:
        config: numbers and sizes of the experts.
        hidden_size: D.
    """

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_active = config.num_active

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape), requires_grad=False)

        self.router = empty(config.count, hidden_size)
        self.gate_up = empty(config.count, 2 * config.size, hidden_size)
        self.down = empty(config.count, hidden_size, config.size)
        self.shared_gate_up = self.shared_down = None
        if config.shared_size is not None:
            self.shared_gate_up = empty(2 * config.shared_size, hidden_size)
            self.shared_down = empty(hidden_size, config.shared_size)

    def forward(self, x_TD: Tensor, ops: RowOps) -> Tensor:
        """Output [T, D] for normalised rows [T, D]."""
        weights_TK, experts_TK = self._routes(x_TD, ops)
        out = torch.zeros_like(x_TD)
        for start in range(0, len(x_TD), PACK_ROWS):
            part = slice(start, start + PACK_ROWS)
            self._add_experts(out[part], x_TD[part], weights_TK[part], experts_TK[part], ops)
        if self.shared_gate_up is not None and self.shared_down is not None:
            out += ops.linear(ops.silu_mul(ops.linear(x_TD, self.shared_gate_up)), self.shared_down)
        return out

    def _routes(self, x_TD: Tensor, ops: RowOps) -> tuple[Tensor, Tensor]:
        """The weights of each row's experts [T, K], which do not add up to 1, and their indices."""
        probabilities_TE = ops.linear(x_TD, self.router).float().softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.num_active, dim=-1)
        return weights_TK.to(x_TD.dtype), experts_TK

    def _add_experts(
        self, out_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, ops: RowOps
    ) -> None:
        """Adds the experts' outputs of some rows, in the order of the experts."""
        flat = experts_TK.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.router)).tolist()
        rows, weights = order // self.num_active, weights_TK.flatten()[order].unsqueeze(1)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                own = slice(start, start + count)
                start += count
                hidden = ops.silu_mul(ops.linear(x_TD[rows[own]], self.gate_up[expert]))
                out_TD.index_add_(0, rows[own], ops.linear(hidden, self.down[expert]).mul_(weights[own]))
