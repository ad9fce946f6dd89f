"""Everything that a burst needs on the device, in one copy.

A burst's canvases, parameters and plan are some sixty small tensors, made on the host. Copied one by one they
would take longer than a short step; in one pinned buffer they are a single copy that nobody waits for. Trees
of equal shapes can use the same memory on the device again. What a burst leaves behind comes back likewise,
while the next one runs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

Tree = TypeVar("Tree")
ALIGNMENT = 16  # bytes

Signature: TypeAlias = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


class HoldsTensors:
    """A class whose attributes are trees too."""


def mapped(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """A copy of a tree with each tensor replaced, in a fixed order.

    Trees are tensors, lists, tuples and dicts of trees, dataclasses and `HoldsTensors` with trees as
    attributes, and anything else, which is kept. A list or tuple that begins with a number, a text or a
    struct has no tensors.
    """
    value: Any = tree
    if isinstance(value, list | tuple) and value and isinstance(value[0], int | str | msgspec.Struct):
        return tree
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if isinstance(value, list):
        return [mapped(item, function) for item in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, tuple):
        items = (mapped(item, function) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value):
        fields = {f.name: mapped(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]
    if isinstance(value, HoldsTensors):
        moved = copy.copy(value)
        vars(moved).update({name: mapped(item, function) for name, item in vars(value).items()})
        return moved  # type: ignore[return-value]
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(tree, note)
    return found


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
