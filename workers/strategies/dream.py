"""Dream's timesteps: of m masked positions floor(m (1 - s / t)) a step, and all that are left in the last."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, prob

ENTROPY, ORIGIN = 0, 3  # their places among the spec's algorithms


def dream(view: BlockView, params: Params) -> Tensor:
    steps, done = params["block_steps"], view.block_forwards.double()
    slope = (1 - params["eps"]) / steps
    share = 1 - (1 - slope * (done + 1)) / (1 - slope * done)
    num_masked, is_last = view.masked.sum(1), done + 1 >= steps
    count = torch.where(is_last, num_masked, (num_masked * share).floor().long())
    kind = params["alg"].long().unsqueeze(1)  # index in the spec's list of choices
    scores = torch.stack([view.neg_entropy, view.log_confidence, view.log_margin])
    score = scores.gather(0, kind.clamp(max=2).expand_as(view.order).unsqueeze(0)).squeeze(0)
    # The n largest of score / alg_temp plus Gumbel noise are n draws without replacement.
    heat = params["alg_temp"].unsqueeze(1)
    noise = -torch.log(-torch.log(view.order.double()))
    weighed = torch.where(kind == ENTROPY, score.double(), prob(score))
    score = torch.where(heat > 0, weighed / heat.clamp(min=1e-30) + noise, score)
    by_chance = view.masked & ((view.accept < share.unsqueeze(1)) | is_last.unsqueeze(1))
    return torch.where(kind == ORIGIN, by_chance, best(score, view.masked, count))
