"""The kernels of the decoding policies: one file a policy, one pure function over tensors.

Shapes are fixed and nothing depends on data, so that a kernel can be compiled and captured as it stands. A
kernel sees the canvases of its own kind only; every canvas is decided by its own numbers. `UNMASK` and
`REMASK` hold the kernels under the names of their specs in `remask.scheduler.policies`.
"""

from __future__ import annotations

from remask.workers.strategies.bernoulli import bernoulli
from remask.workers.strategies.capped_threshold import capped_threshold
from remask.workers.strategies.entropy_bound import entropy_bound
from remask.workers.strategies.factor import factor
from remask.workers.strategies.low_prob import low_prob
from remask.workers.strategies.random_remask import random_remask
from remask.workers.strategies.saber import saber
from remask.workers.strategies.schedule import schedule
from remask.workers.strategies.threshold import threshold
from remask.workers.strategies.view import BlockView, RemaskKernel, UnmaskKernel
from remask.workers.strategies.wino import wino

UNMASK: dict[str, UnmaskKernel] = {
    "schedule": schedule,
    "threshold": threshold,
    "factor": factor,
    "capped_threshold": capped_threshold,
    "entropy_bound": entropy_bound,
    "bernoulli": bernoulli,
}
REMASK: dict[str, RemaskKernel] = {
    "wino": wino,
    "saber": saber,
    "low_prob": low_prob,
    "random": random_remask,
}

__all__ = ["REMASK", "UNMASK", "BlockView"]
