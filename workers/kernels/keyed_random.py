"""The Gumbel numbers of `remask.workers.keyed_random` inside kernels, made where they are used up."""

# Inside kernels Triton's functions take and give what their annotations do not say.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from remask.workers import keyed_random

_GAMMA, _MUL1, _MUL2 = (
    tl.constexpr(word) for word in (keyed_random.GAMMA, keyed_random.MUL1, keyed_random.MUL2)
)


@triton.jit
def _mix(word):
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _MUL1
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _MUL2
    return word ^ ((word >> 31) & ((1 << 33) - 1))


@triton.jit
def uniform(keys, ids):
    """fp32 [N, V]: the numbers behind `keyed_random.gumbel`, to the bit, for int64 keys [N] and ids [V]."""
    word = _mix(keys[:, None] + ((ids.to(tl.int64) + 1) * _GAMMA)[None, :])
    # (r + 1/2) / 2^40 of the upper 40 bits r is (2 r + 1) / 2^41: rounded once, with no need of fp64.
    odd = ((word >> 23) & ((1 << 41) - 1)) | 1
    return tl.minimum(odd.to(tl.float32) * 2.0**-41, 1 - 2.0**-24)


@triton.jit
def gumbel(keys, ids):
    """fp32 [N, V]: `keyed_random.gumbel` up to the rounding of its logarithms."""
    u = uniform(keys, ids)
    # log1p(-u) without log1p. What rounding adds to 1 - u is known exactly: rest + u - 1, at most 2^-25, and
    # 0 from u = 1/2 on. To first order log(rest) is too large by as much; the next order is less than a
    # unit in the last place for every u. So the error is that of the logarithms and of one difference: with
    # exact ones, less than 2e-7 beside the rounding of the result.
    rest = 1 - u
    return -tl.log((u - (1 - rest)) - tl.log(rest))
