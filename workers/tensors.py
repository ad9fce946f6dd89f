"""Trees of tensors, and columns of numbers as tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

Tree = TypeVar("Tree")


def column(values: Sequence[Any], dtype: DTypeLike = np.int64) -> Tensor:
    """A host tensor of one number per canvas."""
    return torch.from_numpy(np.array(values, dtype))


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
