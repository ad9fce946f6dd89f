"""WINO's draft rule (arXiv 2507.18578): c > t1, at most min(max(floor(0.7 m), 5), 20), at least the best."""

from __future__ import annotations

from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, prob


def capped_threshold(view: BlockView, params: Params) -> Tensor:
    cap = (view.masked.sum(1) * 7 // 10).clamp(min=5, max=20)
    confident = (view.masked & (prob(view.log_confidence) > params["t1"].unsqueeze(1))).sum(1)
    return best(view.log_confidence, view.masked, confident.minimum(cap).clamp(min=1))
