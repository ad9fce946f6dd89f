"""Each position by chance, with probability c^k: stochastic unmasking without a model trained for it."""

from __future__ import annotations

from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, best


def bernoulli(view: BlockView, params: Params) -> Tensor:
    # In fp64: the last bit of an fp32 power depends on where in a vector it is computed.
    probability = view.confidence.clamp(0, 1).double() ** params["k"].double().unsqueeze(1)
    drawn = view.masked & (view.accept < probability)
    fallback = (~drawn.any(1)).long()  # an empty draw commits the best one
    return drawn | best(view.confidence, view.masked, fallback)
