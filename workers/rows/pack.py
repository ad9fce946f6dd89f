"""A pack: the rows of many canvases in one forward, without padding, and the questions to the head.

The main rows (prompt and canvas) of all canvases come first. Then come those of second copies, which guidance
needs and in which context tokens are masked, and of the copies that exact leave-one-out probabilities need.
The shadow rows of canvases whose remask policy verifies come last. The *candidates* are the rows that a
policy reads: masked slots (and committed ones, if a policy reads them), the same slots of second copies, the
slots of copies, then shadow rows.

A *plan* (`remask.workers.rows.plan`) holds the part of a pack that is constant while its canvases share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from remask.workers.attention.varlen import VarlenLayout
from remask.workers.sampling import SamplingTables


@dataclass(frozen=True)
class KeptPlaces:
    """The kept keys and values of a pack.

    Attributes:
        places_T: int64 [T]: the kept row that takes those of each row, `DISCARDED` where they are not kept.
        gathered: int64: the kept rows that stand in the pack's keys for the rows of sequences with a light
            forward, which come last; None: the layout says where they are, or there are none.
        num_fresh: main rows whose own keys stand before the gathered ones.
        num_main: all main rows.
    """

    places_T: Tensor
    gathered: Tensor | None
    num_fresh: int
    num_main: int

    @property
    def num_keys(self) -> int:
        """Main keys that the pack sees."""
        return self.num_main if self.gathered is None else self.num_fresh + len(self.gathered)

    def longer(self, num_rows: int) -> KeptPlaces:
        """With `num_rows` more rows, which are not kept."""
        return replace(self, places_T=torch.nn.functional.pad(self.places_T, (0, num_rows)))


@dataclass(frozen=True)
class PackedRows:
    """The input of a transformer: T rows, their visibility, and the N candidates among them.

    Attributes:
        ids_T, positions_T: int64 [T].
        layout: visibility with all rows as queries.
        candidates_H: int64 [H]: rows whose final hidden state is needed: those of main slots, of their second
            copies, then shadow rows.
        candidate_layout: visibility with the candidates as queries.
        slots_N: int64 [N]: slots of the candidates, numbered as in `Plan`, without second copies.
        num_main_slots: number of these slots whose candidate is a main row; the others are shadow rows.
        kept: which keys and values are kept; None: none are.
    """

    ids_T: Tensor
    positions_T: Tensor
    layout: VarlenLayout
    candidates_H: Tensor
    candidate_layout: VarlenLayout
    slots_N: Tensor
    num_main_slots: int
    kept: KeptPlaces | None = None

    def padded(self, padded_len: Callable[[int], int]) -> PackedRows:
        """The pack with padding rows and candidates at the end. No row sees them, and their hidden states are
        discarded.

        Args:
            padded_len: the padded number of rows for a number of rows.
        """

        num_rows = len(self.ids_T)

        def longer(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (0, padded_len(len(values)) - len(values)))

        return replace(
            self,
            ids_T=longer(self.ids_T),
            positions_T=longer(self.positions_T),
            candidates_H=longer(self.candidates_H),
            kept=self.kept.longer(padded_len(num_rows) - num_rows) if self.kept is not None else None,
        )


@dataclass(frozen=True)
class HeadQuery:
    """The questions to the head about N slots of a pack.

    Attributes:
        owners: int64 [N]: index of the canvas of each slot in the burst.
        sampling: the canvases' sampling parameters.
        given: int64 [N]: token whose probability is needed.
        temperature: fp32 [N]: of the proposal; 0: the most probable token.
        keys: int64 [N]: keys of the token stream; None: no canvas draws tokens.
        needs: statistics that policies read, of "margin" and "entropy".
        hidden: the hidden states of the slots; None: they are one after another.
        removed: int64 [N, K]: ids that may not be proposed, padded with -1; None: there are none.
        live: bool [N]: slots whose statistics are read, with static shapes; None: all.
        special: int64: with static shapes, the slots that are answered from whole logits: all live slots
            of canvases that `needs_logits`, and some that are not live; None: none.
    """

    owners: Tensor
    sampling: SamplingTables
    given: Tensor
    temperature: Tensor
    keys: Tensor | None
    needs: frozenset[str]
    hidden: HiddenStates | None = None
    removed: Tensor | None = None
    live: Tensor | None = None
    special: Tensor | None = None

    def select(self, slots: Tensor) -> HeadQuery:
        """The questions about some of the slots (int64 indices)."""

        def part(values: Tensor | None) -> Any:
            return values[slots] if values is not None else None

        hidden = self.hidden
        return replace(
            self,
            owners=self.owners[slots],
            given=self.given[slots],
            temperature=self.temperature[slots],
            keys=part(self.keys),
            hidden=HiddenStates(hidden.first[slots], part(hidden.second)) if hidden is not None else None,
            removed=part(self.removed),
            live=part(self.live),
            special=None,
        )


@dataclass(frozen=True)
class HiddenStates:
    """Which of the hidden states of a pack belong to the slots.

    Attributes:
        first: int64 [N]: index of the hidden state of each slot.
        second: int64 [N]: index of the hidden state of the slot in the second copy of a guided canvas; -1:
            there is none; None: no canvas is guided.
    """

    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class ActiveBlocks:
    """The active blocks of R canvases as tensors [R, B]. Slots beyond a shorter block are not valid.

    Attributes:
        rows: index of each slot's token in the burst's flat tokens.
        valid: slots of blocks of running canvases.
        tokens: ids in the slots.
        masked: valid slots that hold M.
        read: slots whose main row the head reads: masked slots, and committed ones if a policy reads them.
        given: the tokens whose probability is needed: targets of masked slots, else the tokens in the slots.
        is_target: masked slots with a target; None: there are none.
    """

    rows: Tensor
    valid: Tensor
    tokens: Tensor
    masked: Tensor
    read: Tensor
    given: Tensor
    is_target: Tensor | None

    @cached_property
    def committed(self) -> Tensor:
        """Valid slots that hold a token."""
        return self.valid & ~self.masked


@dataclass(frozen=True)
class StepInputs:
    """The state of all canvases of a burst at the beginning of a step.

    Attributes:
        tokens: int64: the burst's flat tokens.
        blocks: the active blocks.
        mask_id: M.
        sampling: the canvases' sampling parameters.
        keys: int64 [R, B]: keys of the token stream; None: no canvas draws tokens.
        needs: additional statistics that policies read.
        removed: int64 [R, B, K]: ids that may not be proposed at a slot; None: there are none.
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
        hidden: HiddenStates | None,
        *,
        live: Tensor | None = None,
        special: Tensor | None = None,
    ) -> HeadQuery:
        """The questions to the head about slots; the first `num_main_slots` belong to main rows."""
        owners = slots_N // self.blocks.tokens.shape[1]
        temperature = self.sampling.temperature[owners]
        temperature[num_main_slots:].zero_()  # proposals of rows that verify are not used
        return HeadQuery(
            owners=owners,
            sampling=self.sampling,
            given=self.blocks.given.flatten()[slots_N],
            temperature=temperature,
            keys=self.keys.flatten()[slots_N] if self.keys is not None else None,
            needs=self.needs,
            hidden=hidden,
            removed=self.removed.flatten(0, 1)[slots_N] if self.removed is not None else None,
            live=live,
            special=special,
        )


def group_canvases(
    num_rows: Mapping[int, int] | Sequence[int], live: Sequence[int], max_rows: int
) -> list[list[int]]:
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


def hidden_states(
    num_first: int,
    num_main: int,
    num_copies: int,
    num_verified: int,
    rows_of_slot: int,
    is_guided: Tensor | None,
) -> HiddenStates:
    """The hidden states of all slots, if they are not one after another.

    Args:
        num_first: slots of first copies.
        num_main: slots of first and second copies.
        num_copies: slots of copies that verify.
        num_verified: slots that shadow rows verify.
        rows_of_slot: shadow rows of each of these; the first answers.
        is_guided: bool [num_first]: slots with a second copy; None: there are none.
    """
    copies = num_main + torch.arange(num_copies)
    shadows = num_main + num_copies + rows_of_slot * torch.arange(num_verified)
    first, second = torch.cat([torch.arange(num_first), copies, shadows]), None
    if is_guided is not None:
        second = torch.full_like(first, -1)
        second[:num_first][is_guided] = torch.arange(num_first, num_main)
    return HiddenStates(first, second)
