"""Policies of a third party that fail in every way: the worst that an installed package may bring."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from remask import RemaskPolicy, UnmaskPolicy
from remask.scheduler.policies.base import MemoryField
from remask.workers.strategies import BlockView, Decision, Memory, Params, best


class MuteError(RuntimeError):
    """An error whose text raises."""

    def __str__(self) -> str:
        raise ValueError("no text")


class RaiseValue(UnmaskPolicy, frozen=True, tag="raise_value"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        raise ValueError("a kernel raised")


class RaiseZero(UnmaskPolicy, frozen=True, tag="raise_zero"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return view.masked / (1 // 0)


class RaiseLate(UnmaskPolicy, frozen=True, tag="raise_late"):
    """Raises after `after` steps of a block, so that only some canvases under this policy raise."""

    after: Annotated[int, Meta(ge=0, le=2**31)] = 2

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        if bool((view.block_forwards >= params["after"]).any()):
            raise IndexError("too late")
        return best(view.confidence, view.masked, torch.ones_like(view.block_forwards))


class RaiseMute(UnmaskPolicy, frozen=True, tag="raise_mute"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        raise MuteError


class RaiseUnsendable(UnmaskPolicy, frozen=True, tag="raise_unsendable"):
    """Raises an error whose text is not valid UTF-8."""

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        raise OSError("half a character: \ud800")


class Shapeless(UnmaskPolicy, frozen=True, tag="shapeless"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return view.masked.new_ones(2, 3, 5)


class Forgetful(RemaskPolicy, frozen=True, tag="forgetful"):
    """Returns its memory without one of the fields, after writing the other."""

    memory: ClassVar[tuple[MemoryField, ...]] = (
        MemoryField("kept", True, 0.0),
        MemoryField("lost", True, 0.0),
    )

    @staticmethod
    def kernel(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
        return Decision(commit, torch.zeros_like(commit), {"kept": memory["kept"] + 1})


class Unready(UnmaskPolicy, frozen=True, tag="unready"):
    """Raises while a worker unpacks the burst, for a block length that the check at load time skips."""

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        if block_lens[0] == 5:
            raise KeyError("no parameters")
        return {}

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return view.masked


class ExceedMemory(UnmaskPolicy, frozen=True, tag="exceed_memory"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")


class ExceedHostMemory(UnmaskPolicy, frozen=True, tag="exceed_host_memory"):
    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return torch.empty(1 << 50, device=view.masked.device) > 0


class ExceedTables(UnmaskPolicy, frozen=True, tag="exceed_tables"):
    """Exceeds the memory while a worker unpacks the burst, for a block length that the check skips."""

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        if block_lens[0] == 5:
            raise MemoryError
        return {}

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return view.masked


class Idle(UnmaskPolicy, frozen=True, tag="idle"):
    """Commits nothing."""

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        return torch.zeros_like(view.masked)


class Kill(UnmaskPolicy, frozen=True, tag="kill"):
    """Kills its process."""

    @staticmethod
    def kernel(view: BlockView, params: Params) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
