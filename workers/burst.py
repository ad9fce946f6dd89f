"""The canvases of a burst as tensors: unpacked from the wire when it begins, packed again when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import REAL, TOKEN, CanvasSpec, CanvasState
from remask.workers.events import EventLog
from remask.workers.keyed_random import stream_keys
from remask.workers.room import NO_ROOM, Room
from remask.workers.rows import ActiveBlocks
from remask.workers.sampling import SamplingTables
from remask.workers.staging import HoldsTensors
from remask.workers.stop_ids import StopIds
from remask.workers.strategies.groups import PolicyGroup, group_policies
from remask.workers.strategies.view import Memory


@dataclass(frozen=True)
class Results:
    """What a burst leaves behind, on the device or on the host; see `BurstState`."""

    tokens: Tensor
    confidences: Tensor
    logprobs: Tensor
    commit_steps: Tensor
    counters: Tensor  # int64 [5, R]: block, num_forwards, block_forwards, finished, fault
    memory: list[Memory]
    removed: Tensor | None
    events: list[Tensor]


class BurstState(HoldsTensors):
    """R canvases, made on the host and then moved to a device (`staging`). Per-slot tables have G + 1
    columns, G the longest canvas; the last takes what padding writes.

    Attributes:
        cu_tokens: boundaries of the sequences in `tokens` (a host list, R + 1).
        tokens: int64 [sum of L + 1]: all sequences one behind the other, then a place for what padding
            writes.
        slot_rows: int64 [R, G + 1]: where in `tokens` each slot stands.
        confidences, logprobs, commit_steps: [R, G + 1].
        block, num_forwards, block_forwards: int64 [R].
        finished: bool [R].
        paused: bool [R]: takes no more steps in this burst: finished, at fault, or at the end of a block
            whose text is to be looked at.
        fault: int64 [R]: see `CanvasState`.
        errors: what the kernels of canvases at fault have raised, by the canvas's number; on the host.
        memory: of each group of `remask`.
        removed: int64 [R, B, K]: ids that may not be proposed at a slot any more, -1 where there is none;
            None where no policy bans what it removes.
    """

    def __init__(
        self, specs: Sequence[CanvasSpec], states: Sequence[CanvasState], room: Room = NO_ROOM
    ) -> None:
        self.specs = specs

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        sequences = [state.token_array() for state in states]
        self.cu_tokens = np.cumsum([0, *map(len, sequences)]).tolist()
        more = max(0, room.main_rows - self.cu_tokens[-1])
        flat = np.concatenate([*sequences, np.zeros(more + 1, dtype=TOKEN)])
        self.tokens = torch.from_numpy(flat.astype(np.int64))
        canvas_lens = [spec.canvas_len for spec in specs]
        self.num_slots = max(*canvas_lens, room.canvas_len)
        self.canvas_len, self.block_len = ints(canvas_lens), ints([spec.block_length for spec in specs])
        self.max_block_len = max(*(spec.block_length for spec in specs), room.widest)
        slots = [np.frombuffer(spec.slots, TOKEN) for spec in specs]
        rows = [own.astype(np.int64) + start for own, start in zip(slots, self.cu_tokens, strict=False)]
        self.slot_rows = self._table(rows, fill=self.cu_tokens[-1])
        self.confidences = self._table([np.frombuffer(s.confidences, REAL) for s in states], fill=0.0)
        self.logprobs = self._table([np.frombuffer(s.logprobs, REAL) for s in states], fill=0.0)
        self.commit_steps = self._table(
            [np.frombuffer(s.commit_steps, TOKEN).astype(np.int64) for s in states], fill=0
        )
        self.block = ints([state.block for state in states])
        self.num_forwards = ints([state.num_forwards for state in states])
        self.block_forwards = ints([state.num_block_forwards for state in states])
        self.finished = torch.tensor([state.finished for state in states])
        self.pauses = torch.tensor([spec.pause_at_blocks for spec in specs])
        self.fault = ints([state.fault for state in states])
        self.errors = {i: state.error for i, state in enumerate(states) if state.error}
        self.paused = self.finished | (self.fault > 0)
        self.always_commits = torch.tensor([spec.always_commits for spec in specs])
        self.sampling = SamplingTables([spec.sampling for spec in specs])
        self.keys = stream_keys(ints([spec.seed for spec in specs]), ints([spec.sample for spec in specs]))
        self.stops = StopIds([spec.stop_ids for spec in specs], room.num_stops)
        self.unmask = group_policies(
            [spec.unmask for spec in specs], [spec.unmask_params() for spec in specs], room
        )
        self.remask = group_policies(
            [spec.remask for spec in specs], [spec.remask_params() for spec in specs], room
        )
        self.reads_committed = torch.tensor([spec.reads_committed_rows for spec in specs])
        self.verifies = torch.tensor([spec.verifies for spec in specs])
        self.random_streams = frozenset[str]().union(
            *(policy.random_streams() for spec in specs for policy in spec.policies)
        )
        self.needs = frozenset[str]().union(
            *(policy.head_needs() for spec in specs for policy in spec.policies)
        )
        self.memory = [self._unpack_memory(group, states) for group in self.remask]
        self.bans_removed = torch.tensor([spec.bans_removed for spec in specs])
        self.removed = self._unpack_removed(states) if any(spec.bans_removed for spec in specs) else None
        self.events = EventLog(specs)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def resume(self) -> None:
        """Makes the canvases ready for another burst."""
        self.paused.copy_(self.finished | (self.fault > 0))

    def blame(self, canvas: int, fault: int, error: str) -> None:
        """Puts a canvas at fault, so that it pauses."""
        self.fault[canvas] = fault
        self.paused[canvas] = True
        self.errors[canvas] = error

    def make_room(self, num_steps: int) -> None:
        """Makes room for the tokens that slots may lose in so many steps."""
        if self.removed is not None:
            # A slot must be filled again before it can lose another token.
            num_held = int((self.removed >= 0).sum(2).max())
            room = num_held + (num_steps + 1) // 2 - self.removed.shape[2]
            self.removed = torch.nn.functional.pad(self.removed, (0, max(0, room)), value=-1)

    def _table(self, rows: Sequence[np.ndarray], fill: float) -> Tensor:
        table = np.full((len(rows), self.num_slots + 1), fill, dtype=rows[0].dtype)
        for line, row in zip(table, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(table)

    def active_slots(self) -> tuple[Tensor, Tensor]:
        """Slots [R, B] of the active blocks (the padding column where there is none), and which are valid."""
        offset = torch.arange(self.max_block_len, device=self.device)
        slots = (self.block * self.block_len).unsqueeze(1) + offset
        valid = (offset < self.block_len.unsqueeze(1)) & (slots < self.canvas_len.unsqueeze(1))
        valid &= ~self.paused.unsqueeze(1)
        return torch.where(valid, slots, self.num_slots), valid

    def active_blocks(self, slots: Tensor, valid: Tensor, mask_id: int) -> ActiveBlocks:
        """The active blocks' places and tokens."""
        rows = self.slot_rows.gather(1, slots)
        rows = torch.where(valid, rows, len(self.tokens) - 1)
        tokens = self.tokens[rows]
        masked = valid & (tokens == mask_id)
        return ActiveBlocks(rows, valid, tokens, masked, masked | (valid & self.reads_committed.unsqueeze(1)))

    def results(self) -> Results:
        """What the burst leaves behind; the events are taken out."""
        return Results(
            tokens=self.tokens,
            confidences=self.confidences,
            logprobs=self.logprobs,
            commit_steps=self.commit_steps,
            counters=torch.stack(
                [self.block, self.num_forwards, self.block_forwards, self.finished.long(), self.fault]
            ),
            memory=self.memory,
            removed=self.removed,
            events=self.events.taken(),
        )

    def to_states(self, results: Results | None = None) -> list[CanvasState]:
        """The canvases as they go back to the scheduler; `results` are on the host (None: all of it is)."""
        if results is None:
            results = self.results()
        tokens = results.tokens.numpy().astype(TOKEN)
        confidences, logprobs = results.confidences.numpy(), results.logprobs.numpy()
        commit_steps = results.commit_steps.numpy().astype(TOKEN)
        counters = results.counters.tolist()
        memories = self._pack_memory(results.memory)
        states = []
        for i, spec in enumerate(self.specs):
            length = spec.canvas_len
            block, num_forwards, block_forwards, finished, fault = (line[i] for line in counters)
            states.append(
                CanvasState(
                    tokens=tokens[self.cu_tokens[i] : self.cu_tokens[i + 1]].tobytes(),
                    confidences=confidences[i, :length].tobytes(),
                    logprobs=logprobs[i, :length].tobytes(),
                    commit_steps=commit_steps[i, :length].tobytes(),
                    memory=memories[i],
                    removed=self._pack_removed(i, results.removed),
                    block=block,
                    num_forwards=num_forwards,
                    num_block_forwards=block_forwards,
                    finished=bool(finished),
                    fault=fault,
                    error=self.errors.get(i, "") if fault else "",
                )
            )
        return states

    def _memory_slices(self, canvas: int) -> dict[str, slice]:
        """Where each field stands in a canvas's memory bytes (counted in numbers)."""
        spec, start, slices = self.specs[canvas], 0, {}
        for field in spec.memory_fields:
            end = start + (spec.block_length if field.per_slot else 1)
            slices[field.name] = slice(start, end)
            start = end
        return slices

    def _unpack_memory(self, group: PolicyGroup, states: Sequence[CanvasState]) -> Memory:
        memory = group.initial_memory(self.max_block_len)
        for place, canvas in enumerate(group.members if memory else ()):
            numbers, slices = np.frombuffer(states[canvas].memory, REAL), self._memory_slices(canvas)
            for field in group.memory_fields:
                values = torch.from_numpy(numbers[slices[field.name]].copy())
                target = memory[field.name][place]
                if field.per_slot:
                    target[: len(values)] = values
                else:
                    target.copy_(values[0])
        return memory

    def _pack_memory(self, memories: Sequence[Memory]) -> list[bytes]:
        parts: list[list[bytes]] = [[] for _ in self.specs]
        for group, memory in zip(self.remask, memories, strict=True):
            arrays = {name: tensor.numpy() for name, tensor in memory.items()}
            for place, canvas in enumerate(group.members if memory else ()):
                for field in group.memory_fields:
                    values = arrays[field.name][place]
                    parts[canvas].append(
                        (values[: self.specs[canvas].block_length] if field.per_slot else values).tobytes()
                    )
        return [b"".join(part) for part in parts]

    def _unpack_removed(self, states: Sequence[CanvasState]) -> Tensor:
        tables = [
            np.frombuffer(state.removed, TOKEN).reshape(spec.block_length, -1)
            for state, spec in zip(states, self.specs, strict=True)
        ]
        width = max(table.shape[1] for table in tables)
        removed = np.full((len(tables), self.max_block_len, width), -1, dtype=np.int64)
        for own, table in zip(removed, tables, strict=True):
            own[: table.shape[0], : table.shape[1]] = table
        return torch.from_numpy(removed)

    def _pack_removed(self, canvas: int, removed: Tensor | None) -> bytes:
        if removed is None or not self.specs[canvas].bans_removed:
            return b""
        own = removed[canvas, : self.specs[canvas].block_length].numpy()
        return own[:, : (own >= 0).sum(1).max()].astype(TOKEN).tobytes()
