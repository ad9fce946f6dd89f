"""Logarithms of probabilities inside kernels, precise near 0 and 1."""

# Inside kernels Triton's functions take and give what their annotations do not say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, with a first-order correction of the rounding of 1 + x."""
    rounded = 1 + x
    return tl.log(rounded) + (x - (rounded - 1)) / rounded


@triton.jit
def log_difference(log_top, gap):
    """log(p1 - p2) of log p1 and log p1 - log p2; -inf where both probabilities are 0."""
    # 1 - exp(-gap) of a small gap by ten terms of its series; the relative error is below 1e-9.
    near = tl.minimum(gap, 0.7)
    share = near * 0.1
    for i in tl.static_range(1, 10):
        share = (1 - share) * near * (1 / (10 - i))
    far = log1p(-tl.exp(-tl.maximum(gap, 0.7)))
    log_share = tl.where(gap < 0.7, tl.log(share), far)
    return tl.where(log_top == float("-inf"), log_top, log_top + log_share)
