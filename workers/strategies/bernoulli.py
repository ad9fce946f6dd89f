"""Each position by chance, with probability c^k: stochastic unmasking without a model trained for it."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best, prob


def bernoulli(view: BlockView, params: Params) -> Tensor:
    # No power: its last bit depends on where in a vector it is computed. (0 to the power of 0 is 1.)
    log_confidence = view.log_confidence.clamp(min=torch.finfo(torch.float32).min)
    drawn = view.masked & (view.accept < prob(params["k"].unsqueeze(1) * log_confidence))
    fallback = (~drawn.any(1)).long()  # an empty draw commits the best one
    return drawn | best(view.log_confidence, view.masked, fallback)
