"""Sums over the vocabulary that are the same to the bit in any company."""

from __future__ import annotations

from torch import Tensor


def row_sums(values_NV: Tensor, *, skip_nan: bool = False) -> Tensor:
    """The sum [N, 1] of each row. torch divides a single row among its threads, which rounds otherwise than a
    sum of one thread."""
    several = values_NV.expand(2, -1) if len(values_NV) == 1 else values_NV
    sums = several.nansum(-1, keepdim=True) if skip_nan else several.sum(-1, keepdim=True)
    return sums[: len(values_NV)]
