"""Dream's timesteps: of m masked positions floor(m (1 - s / t)) a step, and all that are left in the last."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, prob


def dream(view: BlockView, params: Params) -> Tensor:
    alg, steps, done = params["alg"], params["block_steps"], view.block_forwards.double()
    slope = (1 - params["eps"]) / steps
    share = 1 - (1 - slope * (done + 1)) / (1 - slope * done)
    is_last = done + 1 >= steps
    if alg == "origin":
        return view.masked & ((view.accept < share.unsqueeze(1)) | is_last.unsqueeze(1))
    score = {
        "entropy": view.neg_entropy,
        "maskgit_plus": view.log_confidence,
        "topk_margin": view.log_margin,
    }[alg]
    num_masked = view.masked.sum(1)
    count = torch.where(is_last, num_masked, (num_masked * share).floor().long())
    # The n largest of score / alg_temp plus Gumbel noise are n draws without replacement.
    heat = params["alg_temp"].unsqueeze(1)
    noise = -torch.log(-torch.log(view.order.double()))
    weighed = score.double() if alg == "entropy" else prob(score)
    score = torch.where(heat > 0, weighed / heat.clamp(min=1e-30) + noise, score)
    return best(score, view.masked, count)
