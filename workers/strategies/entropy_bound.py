"""The entropy bound (EB-sampler, arXiv 2505.24857): as many of the best as the joint error bound allows.

Committing k positions at once errs by at most the sum of their entropies less the largest of them, in nats;
the largest k >= 1 for which that is at most g is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, exact_cumsum, ranks


def entropy_bound(view: BlockView, params: Params) -> Tensor:
    score = {
        "entropy": view.neg_entropy,
        "confidence": view.log_confidence,
        "margin": view.log_margin,
    }[params["order"]]
    place = ranks(score, view.masked)
    entropy = torch.where(view.masked, -view.neg_entropy, 0.0).clamp(min=0)
    sorted_entropy = torch.zeros_like(entropy).scatter_(1, place, entropy)
    # The bound never shrinks from one k to the next.
    bound = exact_cumsum(sorted_entropy) - sorted_entropy.cummax(1).values
    num_kept = (bound <= params["g"].unsqueeze(1)).sum(1)
    return best(score, view.masked, num_kept.clamp(min=1))
