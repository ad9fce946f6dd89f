"""Copies a burst to the device, and its results back, in one copy each.

A burst's canvases, parameters and plan are about sixty small tensors on the host. Separate copies would take
longer than a short step; one pinned buffer needs a single asynchronous copy. Trees of equal shapes can reuse
memory on the device. The results of a burst are copied to the host while the next burst runs.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from remask.workers.tensors import Tree, mapped, tensors_of

ALIGNMENT = 16  # bytes

Signature: TypeAlias = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


class Buffer(NamedTuple):
    """Memory on a device for trees of one signature.

    Attributes:
        words: uint8 [bytes].
        views: the tensors in it.
        starts: their offsets in bytes.
    """

    words: Tensor
    views: list[Tensor]
    starts: list[int]


def signature(tensors: list[Tensor]) -> Signature:
    """What trees must have in common to use the same buffer."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def new_buffer(tensors: list[Tensor], device: torch.device) -> Buffer:
    """Memory for tensors of these shapes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    words = torch.empty(end, dtype=torch.uint8, device=device)
    return Buffer(words, _views(words, tensors, starts), starts)


def load(tree: Tree, buffer: Buffer) -> Tree:
    """The tree with its tensors in a buffer for its signature. Returns before the copy has ended.

    Reusing the buffer is safe: the copy is ordered on the stream after every kernel that reads it.
    """
    return _load(tree, tensors_of(tree), buffer)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The tree with its tensors in one new piece of memory of the device. Returns before the copy has
    ended."""
    tensors = tensors_of(tree)
    return _load(tree, tensors, new_buffer(tensors, device))


def _load(tree: Tree, tensors: list[Tensor], buffer: Buffer) -> Tree:
    host = torch.empty(buffer.words.shape, dtype=torch.uint8, pin_memory=buffer.words.is_cuda)
    words = host.numpy()
    for tensor, start in zip(tensors, buffer.starts, strict=True):
        words[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    buffer.words.copy_(host, non_blocking=True)
    views = iter(buffer.views)
    return mapped(tree, lambda _: next(views))


class Fetched(Generic[Tree]):
    """A tree on its way to the host."""

    def __init__(self, tree: Tree) -> None:
        self._tree, self._event = tree, None
        if any(tensor.is_cuda for tensor in tensors_of(tree)):
            self._tree = mapped(tree, _to_pinned)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tree:
        """The copy, when it is there; of a tree on the host the tree itself."""
        if self._event is not None:
            self._event.synchronize()
        return self._tree


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _views(words: Tensor, tensors: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Tensors of the same types and shapes in a piece of memory."""
    return [
        words[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
