"""LLaDA's step schedule (arXiv 2502.09992): ceil(masks left / steps left) positions, then one a step."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best


def schedule(view: BlockView, params: Params) -> Tensor:
    score = {
        "confidence": view.log_confidence,
        "random": view.order,
        "margin": view.log_margin,
        "entropy": view.neg_entropy,
    }[params["score"]]
    steps, num_masked = params["block_steps"].long(), view.masked.sum(1)
    steps_left = (steps - view.block_forwards).clamp(min=1)
    count = torch.where(steps > view.block_forwards, (num_masked + steps_left - 1) // steps_left, 1)
    return best(score, view.masked, count)
