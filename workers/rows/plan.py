"""Plans: which rows a step of some canvases may need, and which of them are live.

A plan is made on the host from constants of the canvases (`remask.workers.rows.packer`). It holds every row
that a step may need: a candidate row for every slot of the active blocks, a shadow row for every slot of
blocks that verify, and a copy of the sequence for every slot of those that need exact leave-one-out
probabilities. Which of them are live is data, as is the place of the active blocks. `Plan.pack` runs on the
device without a sync, and its shapes are the same in every step. A CPU, where reading the places of masks
costs nothing, packs the live rows alone (`remask.workers.rows.compact`).

A plan may be larger than its canvases need (`Padding`): plans of equal sizes can use the same memory, and the
graph that was captured on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from remask.workers.attention.varlen import ITS_BLOCK, DeviceShadows, ShadowSpan, VarlenLayout
from remask.workers.rows.pack import ActiveBlocks, HeadQuery, HiddenStates, KeptPlaces, PackedRows, StepInputs


@dataclass(frozen=True)
class Slots:
    """Slots of some sequences' active blocks.

    Attributes:
        slots: int64.
        shifts: int64: row of a sequence's token in the pack minus the token's place in the flat tokens.
        starts: int64: place of a sequence's first token, or of the slot's in a light forward.
        are_valid: whether all of them are slots in this step; else the step says which.
    """

    slots: Tensor
    shifts: Tensor
    starts: Tensor
    are_valid: bool = False

    def places(self, valid: Tensor, places: Tensor) -> Tensor:
        """Places of the slots' tokens. A slot that is not valid has its `starts`."""
        if self.are_valid:
            return places[self.slots]
        return torch.where(valid[self.slots], places[self.slots], self.starts)

    def select(self, flags: Tensor) -> Slots:
        """The flagged slots, which are valid."""
        own = flags.nonzero().squeeze(1)
        return Slots(self.slots[own], self.shifts[own], self.starts[own], are_valid=True)


@dataclass(frozen=True)
class Spare:
    """What a plan knows of rows that may not be live. A compact plan has none.

    Attributes:
        tiles, sees, spans: see `DeviceShadows`.
        special: int64: which of the N slots are of canvases that `needs_logits`; None: none.
        max_special: how many of them can be live at a time. The host does not know how many are, so whole
            logits are made of as many slots, the live ones first. A slot is masked or committed: where its
            main row is read if it is masked and another row verifies it if it is committed, one of the two is
            live.
    """

    tiles: Tensor
    sees: Tensor
    spans: tuple[ShadowSpan, ...]
    special: Tensor | None
    max_special: int

    @cached_property
    def cu_shadows(self) -> np.ndarray:
        """Boundaries of the verifying sequences among the shadow rows, int64."""
        return np.array([0, *(span.end for span in self.spans)])

    @cached_property
    def see_their_block(self) -> np.ndarray:
        """Whether the shadow rows of each verifying sequence see each other, bool."""
        return np.array([span.sees == ITS_BLOCK for span in self.spans], dtype=bool)


@dataclass(frozen=True)
class Plan:
    """The canvases of one pack. Slots are numbered as in the burst's flattened [R, B].

    The sequences are those of all canvases, second copies of the guided ones, then the copies that the exact
    answer needs.

    Attributes:
        token_index, positions: int64 [T_main]: where in the burst's flat tokens each main row's token stands,
            and its position.
        is_hidden: bool [T_main]: fixed tokens of second copies; None if there are none.
        layout, candidate_layout: visibility with all rows, and with the candidates, as queries. With spare
            rows the device decides which shadow rows there are, and they are missing here.
        num_main_slots: slots of first copies.
        main: slots of first and second copies.
        copies: the slot that each copy verifies.
        shadows: slots of shadow rows; their shifts lead to rows of the main sequence.
        read_shadows: int64: the shadow rows that are candidates; None: all.
        hidden: the hidden states of the slots; None: they are one after another.
        slots_N: int64 [N]: the slots that are answered for: of first copies, of copies and of shadow rows.
        spare: None: all rows are live.
        shift: offset of the row that answers for a position: row i - shift answers for position i.
        may_repeat: whether sequences may be equal in a step.
        kept: see `PackedRows`, without shadow rows.
        reusing, num_main_rows: int64: canvases that reuse keys, and the main rows of each; None: there are
            none.
        full_index: int64: places of the tokens of canvases whose keys the forward makes, in the flat tokens;
            None: there are none.
    """

    token_index: Tensor
    positions: Tensor
    is_hidden: Tensor | None
    layout: VarlenLayout
    candidate_layout: VarlenLayout
    num_main_slots: int
    main: Slots
    copies: Slots
    shadows: Slots
    read_shadows: Tensor | None
    hidden: HiddenStates | None
    slots_N: Tensor
    spare: Spare | None
    shift: int
    may_repeat: bool = False
    kept: KeptPlaces | None = None
    reusing: Tensor | None = None
    num_main_rows: Tensor | None = None
    full_index: Tensor | None = None

    @property
    def rows_of_slot(self) -> int:
        """Shadow rows of a slot, one after another; the first answers."""
        return 1 + (self.shift > 0)

    @cached_property
    def cu_main(self) -> np.ndarray:
        """Boundaries of the sequences in `main`, int64."""
        bounds = self.candidate_layout.cu_queries
        return np.array(bounds[: len(bounds) - len(self.copies.slots)])

    def pack(self, step: StepInputs) -> tuple[PackedRows, HeadQuery]:
        """The rows of one forward, and the questions about the candidates among them."""
        valid, places = step.blocks.valid.flatten(), step.blocks.rows.flatten()
        ids, positions = step.tokens[self.token_index], self.positions
        if self.is_hidden is not None:
            ids = ids.masked_fill(self.is_hidden, step.mask_id)
        candidates = [self._answering(self.main.places(valid, places) + self.main.shifts)]
        if len(self.copies.slots):
            copied = self.copies.places(valid, places) + self.copies.shifts
            candidates.append(self._answering(copied))
            ids = ids.scatter(0, copied, step.mask_id)
        layout, candidate_layout = self.layout, self.candidate_layout
        if len(self.shadows.slots):
            verified = self.shadows.places(valid, places)
            if self.spare is not None:
                holes, is_key = (verified + self.shadows.shifts).int(), valid[self.shadows.slots]
                layout, candidate_layout = (
                    _with_shadows(own, self.spare, holes, is_key) for own in (layout, candidate_layout)
                )
            read = self.read_shadows
            candidates.append(
                (torch.arange(len(verified), device=ids.device) if read is None else read) + len(ids)
            )
            masks, at = torch.full_like(verified, step.mask_id), verified - self.shadows.starts
            if self.shift:  # pairs: the row before a slot, with its token, and a mask in the slot
                is_first = torch.arange(len(verified), device=ids.device) % 2 == 0
                before = (verified - self.shift).clamp(min=0)
                masks = torch.where(is_first, step.tokens[before], masks)
                at = torch.where(is_first, at - self.shift, at)
            ids, positions = torch.cat([ids, masks]), torch.cat([positions, at])
        live = special = None
        if self.spare is not None:
            live = self._live(step.blocks)
            special = _special(self.spare, live)
        rows = PackedRows(
            ids_T=ids,
            positions_T=positions,
            layout=layout,
            candidates_H=torch.cat(candidates),
            candidate_layout=candidate_layout,
            slots_N=self.slots_N,
            num_main_slots=self.num_main_slots,
            kept=None if self.kept is None else self.kept.longer(len(ids) - len(self.kept.places_T)),
        )
        return rows, step.ask(self.slots_N, self.num_main_slots, self.hidden, live=live, special=special)

    def _answering(self, rows: Tensor) -> Tensor:
        """The rows that answer for the positions of some rows. (A slot that is not valid stands at the
        beginning of its sequence, where there may be no row before it.)"""
        return (rows - self.shift).clamp(min=0) if self.shift else rows

    def _live(self, blocks: ActiveBlocks) -> Tensor:
        """Which of the slots are answered for, bool [N]."""
        read, committed = blocks.read.flatten(), blocks.committed.flatten()
        is_main = torch.arange(len(self.slots_N), device=read.device) < self.num_main_slots
        return torch.where(is_main, read[self.slots_N], committed[self.slots_N])


def _with_shadows(layout: VarlenLayout, spare: Spare, holes: Tensor, is_key: Tensor) -> VarlenLayout:
    """A layout with the shadow rows of a step."""
    assert layout.device is not None, "the device decides which shadow rows there are"
    shadows = DeviceShadows(spare.tiles, holes, is_key, spare.sees, spare.spans)
    return replace(layout, device=replace(layout.device, shadows=shadows))


def _special(spare: Spare, live: Tensor) -> Tensor | None:
    """The slots that are answered from whole logits: the live ones, and some that are not."""
    if spare.special is None:
        return None
    return spare.special[(~live[spare.special]).to(torch.int8).argsort(stable=True)[: spare.max_special]]
