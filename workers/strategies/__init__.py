"""The kernels of the decoding policies: one file a policy, one pure function over tensors.

Shapes are fixed and nothing depends on data, so that a kernel can be compiled and captured as it stands. A
kernel sees the canvases of its own kind only; every canvas is decided by its own numbers. `KERNELS` holds
them under the names of their specs in `remask.scheduler.policies`.
"""

from __future__ import annotations

from typing import Any

from remask.scheduler.policies import Policy, tag
from remask.workers.strategies.bernoulli import bernoulli
from remask.workers.strategies.capped_threshold import capped_threshold
from remask.workers.strategies.dream import dream
from remask.workers.strategies.entropy_bound import entropy_bound
from remask.workers.strategies.factor import factor
from remask.workers.strategies.low_prob import low_prob
from remask.workers.strategies.random_remask import random_remask
from remask.workers.strategies.rcr import rcr
from remask.workers.strategies.remdm import remdm
from remask.workers.strategies.saber import saber
from remask.workers.strategies.schedule import schedule
from remask.workers.strategies.threshold import threshold
from remask.workers.strategies.view import (
    BlockView,
    Decision,
    Memory,
    Params,
    RemaskKernel,
    UnmaskKernel,
    best,
    doubt,
    exact_sum,
    prob,
)
from remask.workers.strategies.wino import wino

KERNELS: dict[str, UnmaskKernel | RemaskKernel] = {
    "schedule": schedule,
    "threshold": threshold,
    "factor": factor,
    "capped_threshold": capped_threshold,
    "entropy_bound": entropy_bound,
    "bernoulli": bernoulli,
    "dream": dream,
    "wino": wino,
    "rcr": rcr,
    "saber": saber,
    "remdm": remdm,
    "low_prob": low_prob,
    "random": random_remask,
    "oracle_loo": wino,  # what is verified comes from elsewhere
}


def kernel_of(kind: type[Policy]) -> Any:
    """The tensor function of a kind of policy."""
    return kind.kernel or KERNELS[tag(kind)]


__all__ = [
    "KERNELS",
    "BlockView",
    "Decision",
    "Memory",
    "Params",
    "best",
    "doubt",
    "exact_sum",
    "kernel_of",
    "prob",
]
