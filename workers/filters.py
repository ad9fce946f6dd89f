"""Which tokens of a row may be drawn: top-k, top-p and min-p.

All three keep the beginning of the row sorted by probability (ties: the lower id first). So the smallest
logit that is kept, and how many tokens of that logit are kept, say what they keep. A limit on the probability
is a limit on the logit. A limit on the number is found among the most probable tokens. A limit on the share
is found there too, else by bisection over all logits or, with static shapes, by sorting them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from remask.workers.row_sums import row_sums

NUM_CANDIDATES = 4096  # tokens among which the limit on the share is found first, if the host may look


class Filters(NamedTuple):
    """The filters of N rows.

    Attributes:
        heat: fp32 [N, 1]: the temperature of the softmax that is filtered.
        reach: fp32 [N, 1]: how far below the largest one a logit may be, divided by `heat`; see `reach_of`.
        top_k: int64 [N, 1]; 0: off.
        top_p: fp32 [N, 1]; 1: off.
        max_k: no row's `top_k` is larger.
        any_share: whether any row limits the share without a `top_k`.
    """

    heat: Tensor
    reach: Tensor
    top_k: Tensor
    top_p: Tensor
    max_k: int
    any_share: bool


@lru_cache(maxsize=1024)
def reach_of(min_p: float) -> float:
    """The largest d in fp32 for which exp(-d) in fp64 is at least `min_p`, and not 0."""
    low, high = 0, int(np.float32(1024).view(np.int32))  # numbers from 0 on are ordered as their bits are
    while high - low > 1:
        middle = (low + high) // 2
        weight = math.exp(-float(np.int32(middle).view(np.float32)))
        low, high = (middle, high) if weight >= min_p and weight > 0 else (low, middle)
    return float(np.int32(low).view(np.float32))


class _End(NamedTuple):
    """Where the beginning of N rows ends.

    Attributes:
        last: fp32 [N, 1]: the smallest logit that is kept.
        num_equal: int64 [N, 1]: how many tokens of that logit are; those of the lowest ids.
    """

    last: Tensor
    num_equal: Tensor

    def where(self, is_own: Tensor, other: _End) -> _End:
        """The ends of the rows of which `is_own` [N, 1] says so, and others' of the rest."""
        return _End(*(torch.where(is_own, own, theirs) for own, theirs in zip(self, other, strict=True)))


def improbable(logits_NV: Tensor, filters: Filters, *, static_shapes: bool) -> Tensor:
    """Which tokens may not be drawn, bool [N, V]; the most probable one always may.

    Args:
        logits_NV: fp32.
        filters: of the rows.
        static_shapes: whether no shape may depend on numbers, so that the host need not wait for the device.
    """
    fall_NV = (logits_NV.amax(-1, keepdim=True) - logits_NV) / filters.heat
    kept_NV = fall_NV <= filters.reach
    if filters.max_k or filters.any_share:
        last_N1, num_equal_N1 = _end(logits_NV, fall_NV, filters, static_shapes)
        is_last = logits_NV == last_N1
        is_among = is_last & (is_last.cumsum(-1, dtype=torch.int32) <= num_equal_N1.int())
        kept_NV &= is_among.logical_or_(logits_NV > last_N1)
    return kept_NV.logical_not_()


def _end(logits_NV: Tensor, fall_NV: Tensor, filters: Filters, static_shapes: bool) -> _End:
    """What top-k and top-p keep."""
    vocab_size = logits_NV.shape[1]
    max_k = min(filters.max_k, vocab_size)
    end = _End(torch.full_like(filters.heat, -torch.inf), torch.zeros_like(filters.top_k))
    if not filters.any_share:
        return _end_among_top(logits_NV, filters, max_k)[0].where(filters.top_k > 0, end)
    is_open = (filters.top_k == 0) & (filters.top_p < 1)
    num_candidates = max(max_k, NUM_CANDIDATES)
    if static_shapes or num_candidates >= vocab_size:  # on a GPU a sort costs less than the bisection
        return _end_among_top(logits_NV, filters, vocab_size)[0].where(is_open | (filters.top_k > 0), end)
    weight_NV = _weight(fall_NV, filters)
    mass_N1 = filters.top_p * row_sums(weight_NV)
    found, is_whole = _end_among_top(logits_NV, filters, num_candidates, mass_N1)
    end = found.where((is_open & is_whole) | (filters.top_k > 0), end)
    is_open &= ~is_whole
    for row in is_open.squeeze(1).nonzero().squeeze(1).split(1):  # row by row, in the processor's cache
        for values, own in zip(end, _end_by_share(logits_NV[row], weight_NV[row], mass_N1[row]), strict=True):
            values[row] = own
    return end


def _weight(fall: Tensor, filters: Filters) -> Tensor:
    """Weight of each token relative to the most probable one, fp64; 0 beyond `filters.reach`."""
    return fall.double().neg_().exp_().masked_fill_(~(fall <= filters.reach), 0.0)


def _end_among_top(
    logits_NV: Tensor, filters: Filters, num_candidates: int, mass_N1: Tensor | None = None
) -> tuple[_End, Tensor]:
    """What top-k and top-p keep of the most probable tokens, and whether they leave one of those out, bool
    [N, 1].

    Args:
        logits_NV: fp32.
        filters: of the rows.
        num_candidates: how many tokens; not less than the rows' `top_k`.
        mass_N1: what those kept weigh at least where the row has no `top_k`; None: all rows have one.
    """
    if num_candidates == logits_NV.shape[1]:
        ordered = logits_NV.sort(-1, descending=True).values
    else:
        ordered = logits_NV.topk(num_candidates).values
    place = torch.arange(num_candidates, device=ordered.device)
    weight = _weight((ordered[:, :1] - ordered) / filters.heat, filters)
    weight.masked_fill_((place >= filters.top_k) & (filters.top_k > 0), 0.0)
    upto = weight.cumsum(-1)  # zeros at the end of a row change no bit of it
    mass = filters.top_p * upto[:, -1:]
    if mass_N1 is not None:
        mass = torch.where(filters.top_k > 0, mass, mass_N1)
    before = upto - weight
    is_kept = (weight > 0) & ((before < mass) | (place == 0) | (filters.top_p == 1))
    count = is_kept.sum(-1, keepdim=True)
    last = ordered.gather(1, (count - 1).clamp_(min=0))
    return _End(last, count - (ordered > last).sum(-1, keepdim=True)), count < num_candidates


def _end_by_share(logits_NV: Tensor, weight_NV: Tensor, mass_N1: Tensor) -> _End:
    """The fewest of the most probable tokens that weigh at least as much as `mass_N1`.

    The last of them is the largest number from which on as much is found. It is found bit by bit, among
    integers that are ordered as the logits are.
    """
    order_NV = (logits_NV + 0.0).view(torch.int32)  # (no -0.0, which equals 0.0)
    order_NV ^= (order_NV >> 31).bitwise_and_(2**31 - 1)

    def weight_of(is_own_NV: Tensor) -> Tensor:
        return is_own_NV.double().mul_(weight_NV).sum(-1, keepdim=True)  # (`where` is slow on a CPU)

    last_N1 = torch.full_like(mass_N1, -(2**31), dtype=torch.int32)
    for bit in (-(2**31), *(1 << place for place in range(30, -1, -1))):
        higher_N1 = last_N1 + bit
        last_N1 = torch.where(weight_of(order_NV >= higher_N1) >= mass_N1, higher_N1, last_N1)
    is_last_NV = order_NV == last_N1
    each_N1 = is_last_NV.double().mul_(weight_NV).amax(-1, keepdim=True)
    num_equal_N1 = ((mass_N1 - weight_of(order_NV > last_N1)) / each_N1).ceil_().clamp_(min=1).long()
    return _End(torch.where(is_last_NV, logits_NV, -torch.inf).amax(-1, keepdim=True), num_equal_N1)
