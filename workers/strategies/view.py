"""What a strategy kernel sees: active blocks as [R, B] tensors, and the tools that all kernels share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class BlockView(NamedTuple):
    """The active blocks of R canvases, B slots each (shorter blocks are padded with slots that are neither).

    Attributes:
        masked: bool [R, B]: slots that hold M.
        committed: bool [R, B]: slots committed before this step.
        confidence: fp32 [R, B]: of the proposal (see `rank`); -inf where not masked.
        verified: fp32 [R, B]: leave-one-out probability of the committed token, from the shadow rows; 1
            elsewhere.
        margin, neg_entropy: fp32 [R, B]: top-1 minus top-2 probability and -entropy; 0 where nobody needs
            them.
        visible: fp32 [R, B]: probability of the committed token at its own row where a policy asks; else 1.
        top: fp32 [R, B]: the row's largest probability of a token that is not M, for masked slots, and for
            committed ones where a policy asks; else 0.
        order, accept, remask_draw: fp32 [R, B] in (0, 1): random numbers of these streams; 0 where
            nobody reads them.
        block_forwards: int64 [R]: steps taken in this block before this one.
    """

    masked: Tensor
    committed: Tensor
    confidence: Tensor
    verified: Tensor
    margin: Tensor
    neg_entropy: Tensor
    visible: Tensor
    top: Tensor
    order: Tensor
    accept: Tensor
    remask_draw: Tensor
    block_forwards: Tensor

    def select(self, rows: Tensor) -> BlockView:
        """The view of some of the canvases (int64 indices)."""
        return BlockView(*(tensor[rows] for tensor in self))


Params = dict[str, Tensor]  # a policy's fields, and its `block_params` at the active block: fp32 [R] each
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
    """A step's decision; `commit` is what the unmask policy commits, nothing where there is none."""

    def __call__(self, view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision: ...


def ranks(score: Tensor, among: Tensor) -> Tensor:
    """Place of each slot by score (0: largest) within `among`, the others last. Ties: lower slot."""
    order = torch.where(among, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # A slot of `among` whose score is itself -inf must still come before the others.
    order = order.gather(1, (~among).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` [R] slots of `among` with the largest score, bool [R, B]; all where there are fewer."""
    return among & (ranks(score, among) < count.unsqueeze(1))


FIXED_POINT = 2.0**40  # exact for fp32 numbers from 2^-16 on


def exact_sum(values: Tensor) -> Tensor:
    """Sums fp64 [R] of numbers [R, B], taken in fixed point: no padding, order or device changes a bit."""
    return (values.double() * FIXED_POINT).round().long().sum(1).double() / FIXED_POINT


def exact_cumsum(values: Tensor) -> Tensor:
    """Running sums fp64 [R, B], as `exact_sum`."""
    return (values.double() * FIXED_POINT).round().long().cumsum(1).double() / FIXED_POINT
