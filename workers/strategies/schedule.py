"""LLaDA's step schedule (arXiv 2502.09992): ceil(masks left / steps left) positions, then one a step."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best


def schedule(view: BlockView, params: Params) -> Tensor:
    num_masked = view.masked.sum(1)
    steps_left = (params["block_steps"].long() - view.block_forwards).clamp(min=1)
    in_time = params["block_steps"].long() > view.block_forwards
    count = torch.where(in_time, (num_masked + steps_left - 1) // steps_left, 1)
    kind = params["score"].long().unsqueeze(1)  # index in the spec's list of choices
    scores = torch.stack([view.log_confidence, view.order, view.log_margin, view.neg_entropy])
    score = scores.gather(0, kind.expand_as(view.order).unsqueeze(0)).squeeze(0)
    return best(score, view.masked, count)
