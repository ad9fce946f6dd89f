"""The canvases of a burst as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import REAL, TOKEN, CanvasSpec, CanvasState
from remask.workers.burst.events import EventLog
from remask.workers.burst.groups import group_policies
from remask.workers.burst.stop_ids import StopIds
from remask.workers.burst.wire import (
    Results,
    pack_states,
    slot_table,
    unpack_full_tokens,
    unpack_memory,
    unpack_removed,
)
from remask.workers.keyed_random import stream_keys
from remask.workers.rows.pack import ActiveBlocks
from remask.workers.rows.padding import NO_PADDING, Padding
from remask.workers.sampling import SamplingTables
from remask.workers.tensors import HoldsTensors, column


class BurstState(HoldsTensors):
    """R canvases, made on the host and then moved to a device (`staging`). Per-slot tables have G + 1
    columns, G the longest canvas; the last takes what padding writes.

    Attributes:
        cu_tokens: boundaries of the sequences in `tokens` (a host list, R + 1).
        tokens: int64 [sum of L + 1]: all sequences concatenated, then an entry that padding writes to.
        slot_rows: int64 [R, G + 1]: index of each slot in `tokens`.
        targets: int64 [R, G + 1]: the tokens to commit, -1 for the proposals; None: no canvas has targets.
        confidences, logprobs, commit_steps: [R, G + 1].
        full_tokens: like `tokens`: the sequences at the canvases' last full forwards; None: no canvas reuses
            keys.
        reuses, refresh: bool [R] and int64 [R]: see `CanvasSpec`.
        block, num_forwards, block_forwards, num_full_forwards, num_query_rows, num_remasked: int64 [R].
        num_main_rows: int64 [R]: rows of the last forward, without those that verify.
        finished: bool [R].
        paused: bool [R]: takes no more steps in this burst: finished, at fault, or at the end of a block
            whose text the engine searches for stop strings.
        fault: int64 [R]: see `CanvasState`.
        errors: exceptions of the kernels of canvases at fault, by the canvas's index; on the host.
        memory: of each group of `remask`.
        removed: int64 [R, B, K]: ids that may no longer be proposed at a slot, padded with -1; None: no
            policy bans removed tokens.
    """

    def __init__(
        self, specs: Sequence[CanvasSpec], states: Sequence[CanvasState], padding: Padding = NO_PADDING
    ) -> None:
        self.specs = specs

        flat = np.frombuffer(b"".join([state.tokens for state in states]), TOKEN)
        lens = [state.sequence_len for state in states]
        self.cu_tokens = [0, *itertools.accumulate(lens)]
        more = max(0, padding.tokens - self.cu_tokens[-1])
        self.tokens = torch.from_numpy(np.concatenate([flat, np.zeros(more + 1, np.int64)]))
        self.full_tokens: Tensor | None = None
        self.reuses = column([spec.reuse is not None for spec in specs], np.bool_)
        self.refresh = column([spec.refresh for spec in specs])
        if any(spec.reuse for spec in specs):
            self.full_tokens = unpack_full_tokens(states, len(self.tokens))
        canvas_lens = [spec.canvas_len for spec in specs]
        self.num_slots = max(*canvas_lens, padding.canvas_len)
        self.canvas_len, self.block_len = column(canvas_lens), column([spec.block_length for spec in specs])
        self.max_block_len = max(*(spec.block_length for spec in specs), padding.widest)
        is_slot = np.arange(self.num_slots + 1) < np.array(canvas_lens)[:, None]
        rows = np.concatenate([spec.slot_array for spec in specs]) + np.repeat(
            self.cu_tokens[:-1], canvas_lens
        )
        self.slot_rows = slot_table(rows, is_slot, np.int64, fill=self.cu_tokens[-1])
        self.targets: Tensor | None = None
        if any(spec.targets for spec in specs):
            tokens = [
                np.frombuffer(spec.targets, TOKEN) if spec.targets else np.full(spec.canvas_len, -1, TOKEN)
                for spec in specs
            ]
            self.targets = slot_table(np.concatenate(tokens), is_slot, np.int64, fill=-1)
        self.confidences, self.logprobs = (
            slot_table(np.frombuffer(b"".join(parts), REAL), is_slot, np.float32)
            for parts in ([s.confidences for s in states], [s.logprobs for s in states])
        )
        steps = np.frombuffer(b"".join([state.commit_steps for state in states]), TOKEN)
        self.commit_steps = slot_table(steps, is_slot, np.int64)
        self.block = column([state.block for state in states])
        self.num_forwards = column([state.num_forwards for state in states])
        self.block_forwards = column([state.num_block_forwards for state in states])
        self.num_full_forwards = column([state.num_full_forwards for state in states])
        self.num_query_rows = column([state.num_query_rows for state in states])
        self.num_remasked = column([state.num_remasked for state in states])
        rows = [
            (spec.num_main_rows(length), *spec.verifying_rows(length))
            for spec, length in zip(specs, lens, strict=True)
        ]
        self.num_main_rows, self.rows_per_slot, self.rows_per_commit = map(column, zip(*rows, strict=True))
        self.finished = column([state.finished for state in states], np.bool_)
        self.pauses = column([spec.pause_at_blocks for spec in specs], np.bool_)
        self.fault = column([state.fault for state in states])
        self.errors = {i: state.error for i, state in enumerate(states) if state.error}
        self.paused = self.finished | (self.fault > 0)
        self.always_commits = column([spec.always_commits for spec in specs], np.bool_)
        self.sampling = SamplingTables([spec.sampling for spec in specs])
        seeds, samples = column([spec.seed for spec in specs]), column([spec.sample for spec in specs])
        self.keys = stream_keys(seeds, samples)
        self.stops = StopIds([spec.stop_ids for spec in specs], padding.num_stops)
        self.unmask = group_policies(
            [spec.unmask for spec in specs], [spec.unmask_params for spec in specs], padding
        )
        self.remask = group_policies(
            [spec.remask for spec in specs], [spec.remask_params for spec in specs], padding
        )
        self.reads_committed = column([spec.reads_committed_rows for spec in specs], np.bool_)
        self.verifies = column([spec.verifies for spec in specs], np.bool_)
        self.random_streams = frozenset[str]().union(*(spec.random_streams for spec in specs))
        self.needs = frozenset[str]().union(*(spec.head_needs for spec in specs))
        self.memory = [unpack_memory(group, specs, states, self.max_block_len) for group in self.remask]
        self.bans_removed = column([spec.bans_removed for spec in specs], np.bool_)
        self.removed = unpack_removed(specs, states, self.max_block_len)
        self.events = EventLog(specs)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def sequence_len(self, canvas: int) -> int:
        """Rows of a canvas's sequence."""
        return self.cu_tokens[canvas + 1] - self.cu_tokens[canvas]

    def resume(self) -> None:
        """Prepares the canvases for another burst."""
        self.paused.copy_(self.finished | (self.fault > 0))

    def blame(self, canvas: int, fault: int, error: str) -> None:
        """Marks a canvas as at fault, so that it pauses."""
        self.fault[canvas] = fault
        self.paused[canvas] = True
        self.errors[canvas] = error

    def reserve_removed(self, num_steps: int) -> None:
        """Extends `removed` for the tokens that slots may lose in `num_steps` steps."""
        if self.removed is not None:
            # A slot must be filled again before it can lose another token.
            num_held = int((self.removed >= 0).sum(2).max())
            more = num_held + (num_steps + 1) // 2 - self.removed.shape[2]
            self.removed = torch.nn.functional.pad(self.removed, (0, max(0, more)), value=-1)

    def active_slots(self) -> tuple[Tensor, Tensor]:
        """Slots [R, B] of the active blocks, and which are valid; the others are the padding column."""
        offset = torch.arange(self.max_block_len, device=self.device)
        slots = (self.block * self.block_len).unsqueeze(1) + offset
        valid = (offset < self.block_len.unsqueeze(1)) & (slots < self.canvas_len.unsqueeze(1))
        valid &= ~self.paused.unsqueeze(1)
        return torch.where(valid, slots, self.num_slots), valid

    def active_blocks(
        self, slots: Tensor, valid: Tensor, mask_id: int, flat: Tensor | None = None
    ) -> ActiveBlocks:
        """The active blocks' places and tokens, those of `flat` instead of `tokens` if given."""
        rows = self.slot_rows.gather(1, slots)
        rows = torch.where(valid, rows, len(self.tokens) - 1)
        tokens = (self.tokens if flat is None else flat)[rows]
        masked = valid & (tokens == mask_id)
        given, is_target = tokens, None
        if self.targets is not None:
            targets = self.targets.gather(1, slots)
            is_target = masked & (targets >= 0)
            given = torch.where(is_target, targets, tokens)
        read = masked | (valid & self.reads_committed.unsqueeze(1))
        return ActiveBlocks(rows, valid, tokens, masked, read, given, is_target)

    def are_light(self) -> Tensor | None:
        """Whether the next forward of each canvas reuses keys, bool [R]; None: no canvas does; see
        `CanvasSpec.is_light`."""
        if self.full_tokens is None:
            return None
        is_first = self.block_forwards % torch.where(self.refresh > 0, self.refresh, 1 << 62) == 0
        return self.reuses & ~is_first

    def rows_of_forward(self, blocks: ActiveBlocks) -> Tensor:
        """Rows of each canvas in the forward of this step, int64 [R]."""
        num_slots, num_committed = blocks.valid.sum(1), blocks.committed.sum(1)
        return self.num_main_rows + self.rows_per_slot * num_slots + self.rows_per_commit * num_committed

    def results(self) -> Results:
        """The results of the burst. The events are removed from the log."""
        return Results(
            tokens=self.tokens,
            full_tokens=self.full_tokens,
            confidences=self.confidences,
            logprobs=self.logprobs,
            commit_steps=self.commit_steps,
            counters=torch.stack(
                [
                    self.block,
                    self.num_forwards,
                    self.block_forwards,
                    self.num_full_forwards,
                    self.num_query_rows,
                    self.num_remasked,
                    self.finished.long(),
                    self.fault,
                ]
            ),
            memory=self.memory,
            removed=self.removed,
            events=self.events.taken(),
        )

    def to_states(self, results: Results | None = None) -> list[CanvasState]:
        """The canvases for the scheduler. `results` are on the host; None: the state is on the host."""
        return pack_states(self.specs, self.cu_tokens, self.remask, results or self.results(), self.errors)
