"""Policies of a burst by kind: which canvases each kernel serves, with their parameters as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.policies import MemoryField, Policy, RemaskPolicy, tag
from remask.scheduler.policies.base import choices
from remask.workers.rows.padding import NO_PADDING, Padding
from remask.workers.strategies import kernel_of
from remask.workers.strategies.view import Memory, Params


class PolicyKind(NamedTuple):
    """A policy's class and the words that its fields have chosen. A kernel call serves one kind."""

    policy: type[Policy]
    words: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1024)
def kind_of(policy: Policy) -> PolicyKind:
    """The kind of a policy."""
    return PolicyKind(type(policy), tuple((name, getattr(policy, name)) for name in choices(type(policy))))


@lru_cache(maxsize=1024)
def numbers_of(policy: Policy) -> dict[str, float]:
    """The fields that are numbers, as a kernel receives them."""
    words = choices(type(policy))
    return {name: float(getattr(policy, name) or 0) for name in policy.__struct_fields__ if name not in words}


@dataclass(frozen=True)
class PolicyGroup:
    """The canvases of a burst that share a policy and the words that it has chosen.

    Attributes:
        kind: the policy's class and its words.
        kernel: its function, which kinds may share.
        members: their indices in the burst.
        canvases: int64 [Rg]: `members`, padded with the index of the burst's last canvas, which is finished.
        is_whole: whether these are all canvases of the burst.
        fields: the policies' fields that are numbers, fp64 [Rg] each.
        block_fields: fp64 [entries] each: fields that differ from block to block, concatenated over the
            canvases. A canvas of many blocks makes the tables longer by its own entries only.
        first_block, last_block: int64 [Rg]: indices of each canvas's first and last entry.
        memory_fields: the state that the kind carries from step to step.
    """

    kind: PolicyKind
    kernel: Callable[..., Any]
    members: tuple[int, ...]
    canvases: Tensor
    is_whole: bool
    fields: dict[str, Tensor]
    block_fields: dict[str, Tensor]
    first_block: Tensor
    last_block: Tensor
    memory_fields: tuple[MemoryField, ...]

    def params_at(self, block_R: Tensor, part: slice = slice(None)) -> Params:
        """The kernel's parameters for a part of the group.

        Args:
            block_R: int64 [R]: the active blocks of all canvases of the burst.
            part: a range of the group's canvases.
        """
        params = {name: values[part] for name, values in self.fields.items()}
        if self.block_fields:
            last = self.last_block[part]
            place = torch.minimum(self.first_block[part] + block_R[self.canvases[part]], last)
            params |= {name: table[place] for name, table in self.block_fields.items()}
        return {**params, **dict(self.kind.words)}

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
    policies: Sequence[Policy | None],
    block_params: Sequence[dict[str, list[float]]],
    padding: Padding = NO_PADDING,
) -> list[PolicyGroup]:
    """One group for each kind among the policies of a burst's canvases (None: no policy).

    Args:
        policies: one for each canvas.
        block_params: their parameters that differ from block to block.
        padding: sizes of the groups.
    """
    by_kind: dict[PolicyKind, list[int]] = {}
    for canvas, policy in enumerate(policies):
        if policy is not None:
            by_kind.setdefault(kind_of(policy), []).append(canvas)
    groups = []
    # In a fixed order, so that bursts with the same kinds share a CUDA graph in any order of arrival.
    for kind, members in sorted(by_kind.items(), key=lambda item: (tag(item[0].policy), item[0].words)):
        num_more = max(0, padding.group_size - len(members))
        canvases = members + members[:1] * num_more
        numbers = [numbers_of(policy) for c in canvases if (policy := policies[c]) is not None]
        fields = {
            name: torch.from_numpy(np.array([own[name] for own in numbers], np.float64))
            for name in numbers[0]
        }
        block_fields, first_block, last_block = _block_tables(
            [block_params[c] for c in members], num_more, padding.num_blocks
        )
        groups.append(
            PolicyGroup(
                kind=kind,
                kernel=kernel_of(kind.policy),
                members=tuple(members),
                canvases=torch.from_numpy(np.array(members + [len(policies) - 1] * num_more)),
                # (A graph serves groups of equal sizes with any members.)
                is_whole=padding == NO_PADDING and len(members) == len(policies),
                fields=fields,
                block_fields=block_fields,
                first_block=first_block,
                last_block=last_block,
                memory_fields=kind.policy.memory if issubclass(kind.policy, RemaskPolicy) else (),
            )
        )
    return groups


def _block_tables(
    rows: Sequence[dict[str, list[float]]], num_more: int, least: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Fields that differ from block to block, and the indices of each canvas's first and last entry.

    Args:
        rows: the fields of each canvas, a value for each block.
        num_more: number of padding canvases; they use the blocks of the first canvas.
        least: minimum number of entries.
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
