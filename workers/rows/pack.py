"""What a pack is: the rows of many canvases in one forward, without padding, and what is asked about some.

Main rows (prompt and canvas) of all canvases come first, then those of the second copies that guidance needs,
in which fixed tokens are hidden behind masks, and of the copies that the exact answer needs. The shadow rows
of canvases whose remask policy verifies come last. The *candidates* are the rows that somebody reads: masked
slots (and committed ones, where a policy looks at them), the same in second copies, those of copies, then
shadow rows.

A *plan* says which canvases share a pack and holds what does not change while they are together; its `pack`
adds what the current step needs. There are plans that fit (`tight_rows`) and plans of fixed shapes
(`static_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import TOKEN, CanvasSpec
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.sampling import SamplingTables


@dataclass(frozen=True)
class PackedRows:
    """What a transformer gets: T rows, which of them see which, and the N candidates among them.

    Attributes:
        ids_T, positions_T: int64 [T].
        layout: all rows as queries.
        candidates_H: int64 [H]: rows whose final hidden state is wanted: those of main slots, of their second
            copies, then shadow rows.
        candidate_layout: the candidates as queries.
        slots_N: int64 [N]: the slots that are answered for, numbered as in `TightPlan`; not second copies.
        num_main_slots: how many of them are answered for by main rows; the others by shadow rows.
    """

    ids_T: Tensor
    positions_T: Tensor
    layout: VarlenLayout
    candidates_H: Tensor
    candidate_layout: VarlenLayout
    slots_N: Tensor
    num_main_slots: int

    def padded(self, padded_len: Callable[[int], int]) -> PackedRows:
        """The pack with further rows and candidates behind the others. No row sees them, and their hidden
        states mean nothing.

        Args:
            padded_len: how many there shall be, of how many there are.
        """

        def longer(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (0, padded_len(len(values)) - len(values)))

        return replace(
            self,
            ids_T=longer(self.ids_T),
            positions_T=longer(self.positions_T),
            candidates_H=longer(self.candidates_H),
        )


@dataclass(frozen=True)
class HeadQuery:
    """What the head is asked about N slots of a pack.

    Attributes:
        owners: int64 [N]: the canvas of each, its place in the burst.
        sampling: the canvases' sampling parameters.
        given: int64 [N]: the token whose probability is wanted.
        temperature: fp32 [N]: of the proposal; 0: the most probable token.
        keys: int64 [N]: keys of the token stream; None: nobody draws.
        needs: which of "margin" and "entropy" somebody reads.
        guidance: None where nobody is guided: the hidden states are those of the N slots.
        removed: int64 [N, K]: ids that may not be proposed, -1 where there is none; None: nobody has any.
        live: bool [N]: which are asked about, where shapes are fixed; None: all.
        special: int64: where shapes are fixed, the slots that are answered from whole logits: all live slots
            of canvases that `needs_logits`, and some that are not live; None: none.
    """

    owners: Tensor
    sampling: SamplingTables
    given: Tensor
    temperature: Tensor
    keys: Tensor | None
    needs: frozenset[str]
    guidance: Guidance | None = None
    removed: Tensor | None = None
    live: Tensor | None = None
    special: Tensor | None = None

    def select(self, slots: Tensor) -> HeadQuery:
        """What is asked about some of the slots (int64 indices)."""

        def part(values: Tensor | None) -> Any:
            return values[slots] if values is not None else None

        guided = self.guidance
        return replace(
            self,
            owners=self.owners[slots],
            given=self.given[slots],
            temperature=self.temperature[slots],
            keys=part(self.keys),
            guidance=Guidance(guided.first[slots], guided.second[slots]) if guided is not None else None,
            removed=part(self.removed),
            live=part(self.live),
            special=None,
        )


@dataclass(frozen=True)
class Guidance:
    """Which hidden states belong together where some canvases stand in a pack twice.

    Attributes:
        first: int64 [N]: the hidden state of each slot.
        second: int64 [N]: that of the same slot in the second copy; -1 where there is none.
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class ActiveBlocks:
    """The active blocks of R canvases as tensors [R, B]; slots beyond a shorter block are not valid.

    Attributes:
        rows: place of each slot's token in the burst's flat tokens.
        valid: slots that belong to a block of a canvas that is not finished.
        tokens: ids in the slots.
        masked: valid slots that hold M.
        read: slots whose main row the head must look at: the masked, and others where a policy asks for them.
    """

    rows: Tensor
    valid: Tensor
    tokens: Tensor
    masked: Tensor
    read: Tensor


@dataclass(frozen=True)
class StepInputs:
    """What a step knows of all canvases of a burst.

    Attributes:
        tokens: int64: the burst's flat tokens.
        blocks: the active blocks.
        mask_id: M.
        sampling: the canvases' sampling parameters.
        keys: int64 [R, B]: keys of the token stream; None: nobody draws.
        needs: statistics beyond the proposal's probability.
        removed: int64 [R, B, K]: ids that may not be proposed at a slot; None: nobody has any.
    """

    tokens: Tensor
    blocks: ActiveBlocks
    mask_id: int
    sampling: SamplingTables
    keys: Tensor | None
    needs: frozenset[str]
    removed: Tensor | None

    def ask(
        self,
        slots_N: Tensor,
        num_main_slots: int,
        guidance: Guidance | None,
        *,
        live: Tensor | None = None,
        special: Tensor | None = None,
    ) -> HeadQuery:
        """What the head is asked about slots, of which the first `num_main_slots` are of main rows."""
        owners = slots_N // self.blocks.tokens.shape[1]
        is_main = torch.arange(len(owners), device=owners.device) < num_main_slots
        return HeadQuery(
            owners=owners,
            sampling=self.sampling,
            given=self.blocks.tokens.flatten()[slots_N],
            # Proposals of rows that verify are not used.
            temperature=torch.where(is_main, self.sampling.temperature[owners], 0.0),
            keys=self.keys.flatten()[slots_N] if self.keys is not None else None,
            needs=self.needs,
            guidance=guidance,
            removed=self.removed.flatten(0, 1)[slots_N] if self.removed is not None else None,
            live=live,
            special=special,
        )


class Plan(Protocol):
    """The canvases of one pack."""

    def pack(self, step: StepInputs) -> tuple[PackedRows, HeadQuery]:
        """The rows of one forward, and what is asked about the candidates among them."""
        ...


def group_canvases(num_rows: Sequence[int], live: Sequence[int], max_rows: int) -> list[list[int]]:
    """Cuts live canvases into consecutive groups of at most `max_rows` rows; a larger canvas stands alone."""
    groups: list[list[int]] = []
    used = 0
    for canvas in live:
        if not groups or used + num_rows[canvas] > max_rows:
            groups.append([])
            used = 0
        groups[-1].append(canvas)
        used += num_rows[canvas]
    return groups


def hidden_tokens(
    specs: Sequence[CanvasSpec], sequences: Sequence[int], lens: Sequence[int], second: range
) -> Tensor:
    """Which main rows hold a fixed token of a second copy, bool [T_main].

    Args:
        specs: of all canvases of the burst.
        sequences: the canvas of each sequence of the pack.
        lens: their rows.
        second: which of them are second copies.
    """
    flags = [np.zeros(length, dtype=bool) for length in lens]
    for place in second:
        flags[place][:] = True
        flags[place][np.frombuffer(specs[sequences[place]].slots, TOKEN)] = False
    return torch.from_numpy(np.concatenate(flags))
