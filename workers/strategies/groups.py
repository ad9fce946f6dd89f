"""Policies of a burst by kind: which canvases each kernel serves, with their parameters as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.policies import MemoryField, Policy, RemaskPolicy
from remask.scheduler.policies.base import words
from remask.workers.room import NO_ROOM, Room
from remask.workers.strategies import kernel_of
from remask.workers.strategies.view import Memory, Params


@dataclass(frozen=True)
class PolicyGroup:
    """The canvases of a burst that share a policy kind.

    Attributes:
        kind: the policy's class.
        kernel: its function, which kinds may share.
        members: their indices in the burst.
        canvases: int64 [Rg]: the same, and behind them as many of the burst's last canvas as there is room
            for.
        is_whole: whether these are all canvases of the burst, each once.
        fields: the policies' fields, fp64 [Rg] each; of a choice between words, the word's place in the spec.
        block_fields: fp64 [entries] each: fields that differ from block to block, those of all canvases one
            behind the other, so that the many blocks of one canvas make no others' tables longer.
        first_block, last_block: int64 [Rg]: where in them the blocks of each canvas begin and end.
        memory_fields: what the kind carries from step to step.
    """

    kind: type[Policy]
    kernel: Callable[..., Any]
    members: tuple[int, ...]
    canvases: Tensor
    is_whole: bool
    fields: Params
    block_fields: Params
    first_block: Tensor
    last_block: Tensor
    memory_fields: tuple[MemoryField, ...]

    def params_at(self, block_R: Tensor) -> Params:
        """All fields fp64 [Rg] at the active blocks; `block_R` holds those of all canvases of the burst."""
        if not self.block_fields:
            return self.fields
        place = torch.minimum(self.first_block + block_R[self.canvases], self.last_block)
        return {**self.fields, **{name: table[place] for name, table in self.block_fields.items()}}

    def initial_memory(self, block_len: int) -> Memory:
        """Memory at the start of a block, fp32 [Rg] or [Rg, B]."""
        count, device = len(self.canvases), self.canvases.device
        return {
            field.name: torch.full(
                (count, block_len) if field.per_slot else (count,), field.initial, device=device
            )
            for field in self.memory_fields
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
        choices = words(kind)

        def number(name: str, value: Any, choices: dict[str, tuple[str, ...]] = choices) -> float:
            return float(choices[name].index(value)) if name in choices else float(value or 0)

        fields = {
            name: torch.tensor(
                [number(name, getattr(policies[c], name)) for c in canvases], dtype=torch.float64
            )
            for name in kind.__struct_fields__
        }
        block_fields, first_block, last_block = _block_tables(
            [block_params[c] for c in members], num_more, room.num_blocks
        )
        groups.append(
            PolicyGroup(
                kind=kind,
                kernel=kernel_of(kind),
                members=tuple(members),
                canvases=torch.tensor(members + [len(policies) - 1] * num_more),
                # (A graph serves groups of equal sizes, whoever is in them.)
                is_whole=room == NO_ROOM and len(members) == len(policies),
                fields=fields,
                block_fields=block_fields,
                first_block=first_block,
                last_block=last_block,
                memory_fields=kind.memory if issubclass(kind, RemaskPolicy) else (),
            )
        )
    return groups


def _block_tables(
    rows: Sequence[dict[str, list[float]]], num_more: int, least: int
) -> tuple[Params, Tensor, Tensor]:
    """Fields that differ from block to block, and where the blocks of each canvas begin and end.

    Args:
        rows: the fields of each canvas, all of them for every block.
        num_more: canvases that the group is filled up with; they use the blocks of the first.
        least: entries that the tables have at least.
    """
    lens = [max(map(len, row.values()), default=1) for row in rows]
    ends = np.cumsum([0, *lens])
    first, last = (np.append(places, [places[0]] * num_more) for places in (ends[:-1], ends[1:] - 1))
    tables = {}
    for name in rows[0]:
        table = np.zeros(max(least, ends[-1]), dtype=np.float64)
        table[: ends[-1]] = np.concatenate([row[name] for row in rows])
        tables[name] = torch.from_numpy(table)
    return tables, torch.from_numpy(first.astype(np.int64)), torch.from_numpy(last.astype(np.int64))
