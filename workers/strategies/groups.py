"""Policies of a burst by kind: which canvases each kernel serves, with their parameters as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from remask.scheduler.policies import MemoryField, Policy
from remask.workers.room import NO_ROOM, Room
from remask.workers.strategies import kernel_of
from remask.workers.strategies.view import Memory, Params


@dataclass(frozen=True)
class PolicyGroup:
    """The canvases of a burst that share a policy kind.

    Attributes:
        kernel: the kind's function.
        members: their indices in the burst.
        canvases: int64 [Rg]: the same, and behind them as many of the burst's last canvas as there is room
            for.
        fields: the policies' fields, fp32 [Rg] each; of a choice between words, the word's place in the spec.
        block_fields: fp32 [Rg, blocks] each: fields that differ from block to block.
        memory_fields: what the kind carries from step to step.
    """

    kernel: Callable[..., Any]
    members: tuple[int, ...]
    canvases: Tensor
    fields: Params
    block_fields: Params
    memory_fields: tuple[MemoryField, ...]

    def params_at(self, block_R: Tensor) -> Params:
        """All fields fp32 [Rg] at the active blocks; `block_R` holds those of all canvases of the burst."""
        active = block_R[self.canvases].unsqueeze(1)
        now = {
            name: table.gather(1, active.clamp(max=table.shape[1] - 1)).squeeze(1)
            for name, table in self.block_fields.items()
        }
        return {**self.fields, **now}

    def initial_memory(self, block_len: int) -> Memory:
        """Memory at the start of a block, fp32 [Rg] or [Rg, B]."""
        count, device = len(self.canvases), self.canvases.device
        return {
            field.name: torch.full(
                (count, block_len) if field.per_slot else (count,), field.initial, device=device
            )
            for field in self.memory_fields
        }


@cache
def _choices(policy: type) -> dict[str, tuple[str, ...]]:
    """The words that a spec's fields choose from, by field."""
    hints = get_type_hints(policy)
    return {
        name: get_args(hints[name]) for name in policy.__struct_fields__ if get_origin(hints[name]) is Literal
    }


def group_policies(
    policies: Sequence[Policy | None], block_params: Sequence[dict[str, list[float]]], room: Room = NO_ROOM
) -> list[PolicyGroup]:
    """One group for each kind among the policies of a burst's canvases (None: no policy).

    Args:
        policies: one for each canvas.
        block_params: their parameters that differ from block to block.
        room: sizes of the groups.
    """
    by_kind: dict[type[Policy], list[int]] = {}
    for canvas, policy in enumerate(policies):
        if policy is not None:
            by_kind.setdefault(type(policy), []).append(canvas)
    groups = []
    # In a fixed order, so that bursts with the same kinds share a CUDA graph whoever comes first.
    for kind, members in sorted(by_kind.items(), key=lambda item: str(item[0].__struct_config__.tag)):
        num_more = max(0, room.group_size - len(members))
        canvases = members + members[:1] * num_more
        choices = _choices(kind)

        def number(name: str, value: Any, choices: dict[str, tuple[str, ...]] = choices) -> float:
            return float(choices[name].index(value)) if name in choices else float(value or 0)

        fields = {
            name: torch.tensor([number(name, getattr(policies[c], name)) for c in canvases])
            for name in kind.__struct_fields__
        }
        groups.append(
            PolicyGroup(
                kernel=kernel_of(kind),
                members=tuple(members),
                canvases=torch.tensor(members + [len(policies) - 1] * num_more),
                fields=fields,
                block_fields=_block_tables([block_params[c] for c in canvases], room.num_blocks),
                memory_fields=kind.memory,
            )
        )
    return groups


def _block_tables(rows: list[dict[str, list[float]]], least: int) -> Params:
    """fp32 [Rg, blocks] for each name, short rows padded with their last number."""
    width = max([least, *(len(values) for row in rows for values in row.values())])
    return {
        name: torch.tensor([row[name] + row[name][-1:] * (width - len(row[name])) for row in rows])
        for name in rows[0]
    }
