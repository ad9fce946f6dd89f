"""Everything that a burst needs on the device, in one copy.

A burst's canvases, parameters and plan are some sixty small tensors, made on the host. Copied one by one they
would take longer than a short step; in one pinned buffer they are a single copy that nobody waits for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")
ALIGNMENT = 16  # bytes


class HoldsTensors:
    """A class whose attributes are trees too."""


def mapped(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """A copy of a tree with each tensor replaced, in a fixed order.

    Trees are tensors, lists, tuples and dicts of trees, dataclasses and `HoldsTensors` with trees as
    attributes, and anything else, which is kept.
    """
    value: Any = tree
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


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The tree with its tensors in one piece of memory of the device; returns before they are there."""
    tensors, starts, end = tensors_of(tree), [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for own, tensor in zip(_views(host, tensors, starts), tensors, strict=True):
        own.copy_(tensor)
    views = iter(_views(host.to(device, non_blocking=True), tensors, starts))
    return mapped(tree, lambda _: next(views))


def _views(words: Tensor, tensors: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Tensors of the same types and shapes in a piece of memory."""
    return [
        words[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
