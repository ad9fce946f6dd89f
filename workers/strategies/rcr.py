"""Running confidence remasking (arXiv 2508.13148): everything is proposed, the least sure is masked again."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best


def rcr(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    score = {
        "prob": view.log_confidence,
        "margin": view.log_margin,
        "entropy": view.neg_entropy,
    }[params["conf"]]
    stored = torch.where(view.masked, score, memory["stored"])
    slots, steps = view.masked | view.committed, params["block_steps"].long()
    steps_left = (steps - view.block_forwards - 1).clamp(min=0)
    num_left = slots.sum(1) * steps_left // steps
    lowest = best(-stored, slots, num_left)
    return Decision(view.masked & ~lowest, view.committed & lowest, {"stored": stored})
