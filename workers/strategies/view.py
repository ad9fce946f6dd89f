"""What a strategy kernel sees: active blocks as [R, B] tensors, and the tools that all kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class BlockView(NamedTuple):
    """The active blocks of R canvases, B slots each (shorter blocks are padded with slots that are neither).

    Logarithms of probabilities keep the resolution of fp32 however near to 1 a probability is: rank by them
    (`best`). What compares, adds or subtracts probabilities takes them in fp64 (`prob`, `doubt`).

    Attributes:
        masked: bool [R, B]: slots that hold M.
        committed: bool [R, B]: slots committed before this step.
        log_confidence: fp32 [R, B]: log-probability of the proposal (see `rank`); -inf where not masked.
        log_verified: fp32 [R, B]: leave-one-out log-probability of the committed token, from the shadow rows;
            0 elsewhere.
        log_margin, neg_entropy: fp32 [R, B]: log of top-1 minus top-2 probability, and -entropy; -inf and 0
            if no policy reads them.
        log_visible: fp32 [R, B]: log-probability of the committed token at its own row if a policy reads it;
            else 0.
        log_top: fp32 [R, B]: the row's largest log-probability of a token that is not M, for masked slots,
            and for committed ones if a policy reads it; else -inf.
        order, accept, remask_draw: fp32 [R, B] in (0, 1): random numbers of these streams; 0 if no policy
            reads them.
        block_forwards: int64 [R]: steps taken in this block before this one.
    """

    masked: Tensor
    committed: Tensor
    log_confidence: Tensor
    log_verified: Tensor
    log_margin: Tensor
    neg_entropy: Tensor
    log_visible: Tensor
    log_top: Tensor
    order: Tensor
    accept: Tensor
    remask_draw: Tensor
    block_forwards: Tensor

    def select(self, rows: Tensor | slice) -> BlockView:
        """The view of some of the canvases (int64 indices, or a slice)."""
        return BlockView(*(tensor[rows] for tensor in self))

    @property
    def confidence(self) -> Tensor:
        """Probabilities fp32 [R, B] of the proposals; -inf where not masked."""
        return torch.where(self.masked, self.log_confidence.exp(), -torch.inf)

    @property
    def verified(self) -> Tensor:
        """Leave-one-out probabilities fp32 [R, B]."""
        return self.log_verified.exp()

    @property
    def margin(self) -> Tensor:
        """Top-1 minus top-2 probabilities fp32 [R, B]."""
        return self.log_margin.exp()

    @property
    def visible(self) -> Tensor:
        """Probabilities fp32 [R, B] of committed tokens at their own rows."""
        return self.log_visible.exp()

    @property
    def top(self) -> Tensor:
        """The rows' largest probabilities fp32 [R, B]."""
        return self.log_top.exp()


# A policy's fields and its `block_params` at the active block: numbers fp64 [R], choices as the word (`str`).
Params = dict[str, Any]
Memory = dict[str, Tensor]  # fp32 [R] or [R, B] by name


class UnmaskKernel(Protocol):
    """The commit set bool [R, B], a subset of `view.masked`."""

    def __call__(self, view: BlockView, params: Params) -> Tensor: ...


class Decision(NamedTuple):
    """What a step does to the active blocks of R canvases.

    Attributes:
        commit: bool [R, B], within `view.masked`.
        remask: bool [R, B], within `view.committed`.
        memory: the policy's numbers after this step.
        holds: bool [R]: blocks that are not finished although they may be full; None: none is.
        takes_top: bool [R]: canvases that commit the most probable tokens instead of those drawn; None: none.
    """

    commit: Tensor
    remask: Tensor
    memory: Memory
    holds: Tensor | None = None
    takes_top: Tensor | None = None


class RemaskKernel(Protocol):
    """A step's decision; `commit` is what the unmask policy commits, nothing if there is none."""

    def __call__(self, view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision: ...


def ranks(score: Tensor, among: Tensor) -> Tensor:
    """Place of each slot by score (0: largest) within `among`, the others last. Ties: lower slot."""
    # A slot of `among` whose score is itself -inf must still come before the others.
    score = score.clamp(min=torch.finfo(score.dtype).min)
    order = torch.where(among, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` [R] slots of `among` with the largest score, bool [R, B]; all if there are fewer."""
    return among & (ranks(score, among) < count.unsqueeze(1))


def prob(log_prob: Tensor) -> Tensor:
    """Probabilities p in fp64."""
    return log_prob.double().exp()


def doubt(log_prob: Tensor) -> Tensor:
    """1 - p in fp64, with the digits that p near 1 has no room for."""
    return -log_prob.double().expm1()


UNIT = 2.0**-53  # of exact sums: fp64 probabilities from 1/2 to 1 are whole multiples of it
_LIMB = 2**32


def whole_units(values: Tensor) -> Tensor:
    """Numbers below 512 in fp64, rounded to what exact sums are made of."""
    return (values.double() / UNIT).round() * UNIT


def exact_sum(values: Tensor) -> Tensor:
    """Sums fp64 [R] of the `whole_units` of numbers [R, B], rounded once: no padding, order or device changes
    a bit."""
    upper, lower = _limbs(values)
    return _joined(upper.sum(1), lower.sum(1))


def exact_cumsum(values: Tensor) -> Tensor:
    """Running sums fp64 [R, B], as `exact_sum`."""
    upper, lower = _limbs(values)
    return _joined(upper.cumsum(1), lower.cumsum(1))


def _limbs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of units, int64, as two halves: neither of their sums over 2^31 slots overflows."""
    units = (values.double() / UNIT).round().long()
    return units >> 32, units & (_LIMB - 1)


def _joined(upper: Tensor, lower: Tensor) -> Tensor:
    return (upper.double() * _LIMB + lower.double()) * UNIT
