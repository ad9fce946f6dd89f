"""The kernels of the decoding policies: one file a policy, one pure function over tensors.

The kernel of the policy `name` is the function `name` in the file `name.py`. Shapes are fixed and nothing
depends on data, so that a kernel can be compiled and captured unchanged. A kernel sees the canvases of its
own policy only; every canvas is decided by its own numbers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from remask.scheduler.policies import Policy, tag
from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best, doubt, exact_sum, prob


def kernel_of(kind: type[Policy]) -> Any:
    """The kernel of a policy: an `UnmaskKernel` or a `RemaskKernel`."""
    return kind.kernel or getattr(import_module(f"{__name__}.{tag(kind)}"), tag(kind))


__all__ = ["BlockView", "Decision", "Memory", "Params", "best", "doubt", "exact_sum", "kernel_of", "prob"]
