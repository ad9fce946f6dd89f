"""Converts canvases between their bytes on the wire and the tables of a burst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from remask.scheduler.canvas import REAL, TOKEN, CanvasSpec, CanvasState
from remask.workers.burst.groups import PolicyGroup
from remask.workers.strategies.view import Memory


@dataclass(frozen=True)
class Results:
    """The results of a burst, on the device or on the host; see `BurstState`."""

    tokens: Tensor
    full_tokens: Tensor | None
    confidences: Tensor
    logprobs: Tensor
    commit_steps: Tensor
    # int64 [8, R]: block, num_forwards, block_forwards, num_full_forwards, num_query_rows, num_remasked,
    # finished, fault
    counters: Tensor
    memory: list[Memory]
    removed: Tensor | None
    events: list[Tensor]


def slot_table(values: np.ndarray, is_slot: np.ndarray, dtype: DTypeLike, fill: float = 0) -> Tensor:
    """A table of `dtype`: the concatenated values of all canvases where `is_slot` [R, G + 1] is set, `fill`
    elsewhere."""
    table = np.full(is_slot.shape, fill, dtype)
    table[is_slot] = values
    return torch.from_numpy(table)


def unpack_full_tokens(states: Sequence[CanvasState], length: int) -> Tensor:
    """The sequences at the last full forwards, int64 [length]; the current ones where the next is full."""
    flat = np.frombuffer(b"".join([state.full_tokens or state.tokens for state in states]), TOKEN)
    return torch.from_numpy(np.concatenate([flat, np.zeros(length - len(flat), np.int64)]))


def unpack_memory(
    group: PolicyGroup, specs: Sequence[CanvasSpec], states: Sequence[CanvasState], block_len: int
) -> Memory:
    """The memory of a group's canvases.

    Args:
        group: the canvases of a remask policy.
        specs, states: of all canvases of the burst.
        block_len: B, the longest block of the burst.
    """
    memory = group.initial_memory(block_len)
    block_lens = np.array([specs[canvas].block_length for canvas in group.members])
    for own_len in np.unique(block_lens) if memory else ():
        (places,) = (block_lens == own_len).nonzero()
        held = b"".join([states[group.members[place]].memory for place in places])
        numbers = np.frombuffer(held, REAL).reshape(len(places), -1)
        for field in group.memory_fields:
            own, numbers = np.split(numbers, [own_len if field.per_slot else 1], axis=1)
            if field.per_slot:
                memory[field.name].numpy()[places, :own_len] = own
            else:
                memory[field.name].numpy()[places] = own[:, 0]
    return memory


def unpack_removed(
    specs: Sequence[CanvasSpec], states: Sequence[CanvasState], block_len: int
) -> Tensor | None:
    """The removed ids of all canvases, int64 [R, B, K], padded with -1; None if no policy bans them."""
    if not any(spec.bans_removed for spec in specs):
        return None
    tables = [
        np.frombuffer(state.removed, TOKEN).reshape(spec.block_length, -1)
        for state, spec in zip(states, specs, strict=True)
    ]
    width = max(table.shape[1] for table in tables)
    removed = np.full((len(tables), block_len, width), -1, dtype=np.int64)
    for own, table in zip(removed, tables, strict=True):
        own[: table.shape[0], : table.shape[1]] = table
    return torch.from_numpy(removed)


def pack_states(
    specs: Sequence[CanvasSpec],
    cu_tokens: Sequence[int],
    groups: Sequence[PolicyGroup],
    results: Results,
    errors: Mapping[int, str],
) -> list[CanvasState]:
    """The canvases of a burst for the scheduler.

    Args:
        specs: of all canvases.
        cu_tokens: boundaries of their sequences.
        groups: of the remask policies.
        results: of the burst, on the host.
        errors: exceptions of kernels, by index of the canvas.
    """
    tokens, full_tokens = results.tokens.numpy().astype(TOKEN), None
    if results.full_tokens is not None:
        full_tokens = results.full_tokens.numpy().astype(TOKEN)
    confidences, logprobs = results.confidences.numpy(), results.logprobs.numpy()
    commit_steps = results.commit_steps.numpy().astype(TOKEN)
    counters = results.counters.tolist()
    memories = _pack_memory(specs, groups, results.memory)
    states = []
    for i, spec in enumerate(specs):
        length = spec.canvas_len
        block, num_forwards, block_forwards, num_full, num_query_rows, num_remasked, finished, fault = (
            line[i] for line in counters
        )
        own = slice(cu_tokens[i], cu_tokens[i + 1])
        is_light = not finished and spec.is_light(block_forwards)
        states.append(
            CanvasState(
                tokens=tokens[own].tobytes(),
                full_tokens=full_tokens[own].tobytes() if full_tokens is not None and is_light else b"",
                confidences=confidences[i, :length].tobytes(),
                logprobs=logprobs[i, :length].tobytes(),
                commit_steps=commit_steps[i, :length].tobytes(),
                memory=memories[i],
                removed=_pack_removed(spec, results.removed[i]) if results.removed is not None else b"",
                block=block,
                num_forwards=num_forwards,
                num_block_forwards=block_forwards,
                num_full_forwards=num_full,
                num_query_rows=num_query_rows,
                num_remasked=num_remasked,
                finished=bool(finished),
                fault=fault,
                error=errors.get(i, "") if fault else "",
            )
        )
    return states


def _pack_memory(
    specs: Sequence[CanvasSpec], groups: Sequence[PolicyGroup], memories: Sequence[Memory]
) -> list[bytes]:
    parts: list[list[bytes]] = [[] for _ in specs]
    for group, memory in zip(groups, memories, strict=True):
        arrays = {name: tensor.numpy() for name, tensor in memory.items()}
        for place, canvas in enumerate(group.members if memory else ()):
            for field in group.memory_fields:
                values = arrays[field.name][place]
                own = values[: specs[canvas].block_length] if field.per_slot else values
                parts[canvas].append(own.tobytes())
    return [b"".join(part) for part in parts]


def _pack_removed(spec: CanvasSpec, removed_BK: Tensor) -> bytes:
    if not spec.bans_removed:
        return b""
    own = removed_BK[: spec.block_length].numpy()
    return own[:, : (own >= 0).sum(1).max()].astype(TOKEN).tobytes()
