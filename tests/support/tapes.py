"""A tape in the place of a CUDA graph: it records every operation of a step and repeats them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from remask.workers.burst.graphs import Graph


def storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_flatten(tree)[0] if isinstance(x, Tensor)}


class Tape(TorchDispatchMode):
    """A recorded step. As with CUDA, recording it changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor):
                place = x.untyped_storage().data_ptr()
                if place not in self.made and place not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                    self.before[place] = (whole, whole.clone())
        out = func(*args, **kwargs)
        self.made |= storages(out) - storages((args, kwargs))
        self.calls.append((func, args, kwargs, out))
        return out

    def restore(self) -> None:
        for whole, copy in self.before.values():
            whole.copy_(copy)
        self.before.clear()

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and not storages(old) & storages((args, kwargs)):
                    old.copy_(new)


class Recorder:
    """Captures on tapes, of a given number of bytes each."""

    def __init__(self, num_bytes: int = 1) -> None:
        self.tapes: list[Tape] = []
        self.num_bytes = num_bytes

    def __call__(self, step: Callable[[], int]) -> tuple[Graph, int, int]:
        with (tape := Tape()):
            num_rows = step()
        tape.restore()
        self.tapes.append(tape)
        return tape, num_rows, self.num_bytes
