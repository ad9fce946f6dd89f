"""Moves canvases from a burst's tensors to those of the next burst, on the device.

When canvases join or leave, the next burst has new tensors. The host knows their sizes in advance, but it
knows the contents of the canvases only when the previous burst has ended. So the next burst is built with
outdated contents, and the current ones are copied on the device, without a sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remask.workers.burst.groups import PolicyKind
from remask.workers.burst.staging import to_device
from remask.workers.burst.state import BurstState
from remask.workers.strategies.view import Memory

TABLES = ("confidences", "logprobs", "commit_steps")  # [R, slots]
COUNTERS = (
    "block", "num_forwards", "block_forwards", "num_query_rows", "num_remasked", "finished", "fault",
)  # [R]  # fmt: skip


@dataclass(frozen=True)
class Carried:
    """The contents of n canvases, on the device.

    Attributes:
        tokens: int64: their sequences, concatenated.
        tables: [n, slots] each.
        counters: [n] each.
        memory: for each kind of policy that has memory, the numbers of its canvases among the n, and the
            memory.
    """

    tokens: Tensor
    tables: dict[str, Tensor]
    counters: dict[str, Tensor]
    memory: dict[PolicyKind, tuple[list[int], Memory]]


def take(state: BurstState, canvases: Sequence[int]) -> Carried:
    """The contents of some canvases of a burst after all enqueued steps.

    Args:
        state: of the burst.
        canvases: their indices in it.
    """
    places = _places_in_groups(state, canvases)
    lists = {kind: list(own.values()) for kind, own in places.items()}
    (rows, own), indices = to_device(
        ((_rows(state, canvases), _indices(canvases)), [_indices(own) for own in lists.values()]),
        state.device,
    )
    memories = {group.kind: memory for group, memory in zip(state.remask, state.memory, strict=True)}
    memory = {
        kind: (
            list(places[kind]),
            {name: held.index_select(0, index) for name, held in memories[kind].items()},
        )
        for kind, index in zip(lists, indices, strict=True)
    }
    return Carried(
        tokens=state.tokens.index_select(0, rows),
        tables={name: getattr(state, name).index_select(0, own) for name in TABLES},
        counters={name: getattr(state, name).index_select(0, own) for name in COUNTERS},
        memory=memory,
    )


def put(carried: Carried, state: BurstState, canvases: Sequence[int]) -> None:
    """Writes the contents of canvases into the tensors of another burst.

    Args:
        carried: from `take`.
        state: of the other burst, which holds the same canvases.
        canvases: their indices in it.
    """
    places = _places_in_groups(state, canvases)
    lists = [[places[kind][n] for n in members] for kind, (members, _) in carried.memory.items()]
    (rows, own), indices = to_device(
        ((_rows(state, canvases), _indices(canvases)), [_indices(own) for own in lists]), state.device
    )
    state.tokens.index_copy_(0, rows, carried.tokens)
    for name, values in carried.tables.items():
        table = getattr(state, name)
        width = min(table.shape[1], values.shape[1])
        table[:, :width].index_copy_(0, own, values[:, :width])
    for name, values in carried.counters.items():
        getattr(state, name).index_copy_(0, own, values)
    memories = {group.kind: memory for group, memory in zip(state.remask, state.memory, strict=True)}
    for (kind, (_, memory)), index in zip(carried.memory.items(), indices, strict=True):
        for name, values in memory.items():
            held = memories[kind][name]
            if held.ndim == 2:  # blocks of other canvases may be wider
                width = min(held.shape[1], values.shape[1])
                held, values = held[:, :width], values[:, :width]
            held.index_copy_(0, index, values)
    state.resume()


def _places_in_groups(state: BurstState, canvases: Sequence[int]) -> dict[PolicyKind, dict[int, int]]:
    """For each kind of policy with memory, the places of its canvases in the group, by their number in
    `canvases`."""
    number = {canvas: n for n, canvas in enumerate(canvases)}
    found = {}
    for group in state.remask:
        places = {number[canvas]: i for i, canvas in enumerate(group.members) if canvas in number}
        if group.memory_fields and places:
            found[group.kind] = places
    return found


def _rows(state: BurstState, canvases: Sequence[int]) -> Tensor:
    """Indices of the canvases' tokens in a burst's flat tokens, int64."""
    cu_tokens = state.cu_tokens
    return torch.from_numpy(np.concatenate([np.arange(cu_tokens[c], cu_tokens[c + 1]) for c in canvases]))


def _indices(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
