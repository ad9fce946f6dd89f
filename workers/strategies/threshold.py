"""Fast-dLLM's threshold rule (arXiv 2505.22618): the best position, and each other with c >= t."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, prob


def threshold(view: BlockView, params: Params) -> Tensor:
    one = torch.ones_like(view.block_forwards)
    confident = view.masked & (prob(view.log_confidence) >= params["t"].unsqueeze(1))
    return confident | best(view.log_confidence, view.masked, one)
