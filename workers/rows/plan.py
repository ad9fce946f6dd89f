"""The packer: which rows a step of some canvases may need, and which of them are live.

A plan is made on the host from constants of the canvases, and holds every row that a step may need: a
candidate row for every slot of the active blocks, a shadow row for every slot of blocks that verify, and a
copy of the sequence for every slot of those that need exact leave-one-out probabilities. Which of them are
live is data, as is the place of the active blocks. `Plan.pack` runs on the device without a sync, and its
shapes are the same in every step. A CPU, where reading the places of masks costs nothing, packs the live rows
alone (`remask.workers.rows.compact`).

A plan may be larger than its canvases need (`Padding`): plans of equal sizes can use the same memory, and the
graph that was captured on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import TOKEN, CanvasSpec
from remask.workers.attention.varlen import (
    ITS_BLOCK,
    ITS_PAIR,
    ITSELF,
    SHADOW_TILE,
    DeviceLayout,
    DeviceShadows,
    VarlenLayout,
)
from remask.workers.rows.pack import (
    ActiveBlocks,
    HeadQuery,
    HiddenStates,
    PackedRows,
    StepInputs,
    hidden_states,
)
from remask.workers.rows.padding import NO_PADDING, Padding


@dataclass(frozen=True)
class Slots:
    """Slots of some sequences' active blocks.

    Attributes:
        slots: int64.
        shifts: int64: row of a sequence's token in the pack minus the token's place in the flat tokens.
        starts: int64: place of a sequence's first token.
        are_valid: whether all of them are slots in this step; else the step tells which.
    """

    slots: Tensor
    shifts: Tensor
    starts: Tensor
    are_valid: bool = False

    def places(self, valid: Tensor, places: Tensor) -> Tensor:
        """Places of the slots' tokens. A slot that is not valid has the first place of its sequence."""
        if self.are_valid:
            return places[self.slots]
        return torch.where(valid[self.slots], places[self.slots], self.starts)

    def select(self, flags: Tensor) -> Slots:
        """The flagged slots, which are valid."""
        return Slots(self.slots[flags], self.shifts[flags], self.starts[flags], are_valid=True)


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
    spans: tuple[tuple[int, int, int, int, int], ...]
    special: Tensor | None
    max_special: int

    @cached_property
    def cu_shadows(self) -> Tensor:
        """Boundaries of the verifying sequences among the shadow rows, int64, on the host."""
        return torch.tensor([0, *(end for *_, end in self.spans)])


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

    @property
    def rows_of_slot(self) -> int:
        """Shadow rows of a slot, one after another; the first answers."""
        return 1 + (self.shift > 0)

    @cached_property
    def cu_main(self) -> Tensor:
        """Boundaries of the sequences in `main`, int64, on the host."""
        bounds = self.candidate_layout.cu_queries
        return torch.tensor(bounds[: len(bounds) - len(self.copies.slots)])

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


def plan_pack(
    canvases: Sequence[int],
    specs: Sequence[CanvasSpec],
    cu_tokens: Sequence[int],
    padding: Padding = NO_PADDING,
) -> Plan:
    """The plan for some canvases of a burst, on the host.

    Args:
        canvases: indices in the burst.
        specs: of all canvases of the burst.
        cu_tokens: boundaries of all sequences of the burst in its flat tokens.
        padding: sizes that other bursts have. Nobody may be guided or need copies then.
    """
    width = max(padding.widest, max(spec.block_length for spec in specs))
    guided = [c for c in canvases if specs[c].is_guided]
    copies_of = [c for c in canvases for _ in range(specs[c].num_copies)]
    assert padding == NO_PADDING or not (guided or copies_of), "they are not padded"
    sequences = np.array([*canvases, *guided, *copies_of])
    bounds = np.array(cu_tokens)
    starts, lens = bounds[sequences], bounds[sequences + 1] - bounds[sequences]
    cu_keys = _bounds(lens)
    num_blocks, num_copies = len(canvases) + len(guided), len(copies_of)
    # A canvas without rows, with which bursts are padded, has no candidates either.
    block_lens = np.array([specs[c].block_length for c in sequences[:num_blocks]]) * (lens[:num_blocks] > 0)
    shift = max(specs[c].shift for c in canvases)  # what fills up a burst has none
    rows_of_slot = 1 + (shift > 0)  # shadow rows, which follow each other
    num_shadows = np.array([specs[c].num_shadow_rows for c in canvases])
    cu_shadows = _bounds(num_shadows)

    def slots_of(places: np.ndarray, numbers: np.ndarray, least: int = 0) -> Slots:
        """Slots given by the place of their sequence in the pack and their number in the block, padded with
        the first slot of the last canvas, at row 0."""
        table = np.empty((3, max(least, len(places))), dtype=np.int64)
        own, table[:, len(places) :] = (
            table[:, : len(places)],
            [[len(specs) * width - width], [-bounds[-2]], [bounds[-2]]],
        )
        own[0] = sequences[places] * width + numbers
        own[1] = cu_keys[places] - starts[places]
        own[2] = starts[places]
        slots, shifts, sequence_starts = torch.from_numpy(table).unbind()
        return Slots(slots, shifts, sequence_starts)

    main = slots_of(*_counted(block_lens), padding.slots)
    copy_numbers = [i for c in canvases for i in range(specs[c].num_copies)]
    copies = slots_of(np.arange(num_copies) + num_blocks, np.array(copy_numbers, dtype=np.int64))
    owners, numbers = _counted(num_shadows)
    shadows = slots_of(owners, numbers // rows_of_slot, padding.shadow_rows)
    spans = tuple(
        (
            place,
            int(cu_keys[place]),
            int(cu_keys[place + 1]),
            int(cu_shadows[place]),
            int(cu_shadows[place + 1]),
        )
        for place in num_shadows.nonzero()[0].tolist()
    )
    sees = np.full(len(shadows.slots), ITSELF, dtype=np.int8)
    if shift:
        sees[: cu_shadows[-1] : 2] = ITS_PAIR
    else:
        see_each_other = np.array([specs[c].shadows_see_each_other for c in canvases])
        sees[: cu_shadows[-1]] = np.repeat(np.where(see_each_other, ITS_BLOCK, ITSELF), num_shadows)
    num_first = int(block_lens[: len(canvases)].sum()) if guided else len(main.slots)
    slots_N = torch.cat([main.slots[:num_first], copies.slots, shadows.slots[::rows_of_slot]])
    hidden = None
    if guided or shift:
        is_guided = np.repeat([specs[c].is_guided for c in canvases], block_lens[: len(canvases)])
        num_answers = len(slots_N) - num_first - num_copies
        own = torch.from_numpy(is_guided) if guided else None
        hidden = hidden_states(num_first, len(main.slots), num_copies, num_answers, rows_of_slot, own)
    special = [c for c in canvases if specs[c].needs_logits]
    is_special = np.isin(slots_N.numpy() // width, special)
    owners, numbers = _counted(lens)
    num_more = max(0, padding.main_rows - len(owners))
    token_index = np.concatenate([starts[owners] + numbers, np.full(num_more, bounds[-1])])
    positions = np.concatenate([numbers, np.zeros(num_more, dtype=np.int64)])
    cu_queries = _bounds(np.concatenate([block_lens, np.ones(num_copies, dtype=np.int64)]))
    if padding != NO_PADDING:  # what fills up belongs to the last canvas, so that its numbers are defined
        cu_keys[-1], cu_queries[-1] = len(token_index), len(main.slots)
    cu_queries_T, cu_keys_T = (torch.from_numpy(bounds.astype(np.int32)) for bounds in (cu_queries, cu_keys))
    max_keys, max_queries = (
        max(int(lens.max()), padding.max_keys),
        max(int(block_lens.max()), padding.max_queries),
    )
    keys = tuple(cu_keys.tolist())
    return Plan(
        token_index=torch.from_numpy(token_index),
        positions=torch.from_numpy(positions),
        is_hidden=_hidden_tokens(specs, sequences.tolist(), lens.tolist(), range(len(canvases), num_blocks))
        if guided
        else None,
        layout=VarlenLayout(keys, keys, (), DeviceLayout(cu_keys_T, cu_keys_T, max_keys, max_keys, None)),
        candidate_layout=VarlenLayout(
            tuple(cu_queries.tolist()),
            keys,
            (),
            DeviceLayout(cu_queries_T, cu_keys_T, max_queries, max_keys, None),
        ),
        num_main_slots=num_first,
        main=main,
        copies=copies,
        shadows=shadows,
        read_shadows=None,
        hidden=hidden,
        slots_N=slots_N,
        spare=Spare(
            tiles=_tiles(
                spans,
                num_tiles=padding.shadow_rows // SHADOW_TILE + len(canvases) if padding.shadow_rows else 0,
            ),
            sees=torch.from_numpy(sees),
            spans=spans,
            special=torch.from_numpy(is_special.nonzero()[0]) if is_special.any() else None,
            max_special=sum(map(_max_live, (specs[c] for c in special))),
        ),
        shift=shift,
    )


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


def _hidden_tokens(
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


def _max_live(spec: CanvasSpec) -> int:
    """How many of a canvas's rows the head is asked about in one step, at most."""
    if_committed = spec.reads_committed_rows + (spec.num_shadow_rows > 0) + (spec.num_copies > 0)
    return spec.block_length * max(1, if_committed)


def _bounds(counts: np.ndarray) -> np.ndarray:
    """Where each of several runs begins, and where the last ends, int64 [runs + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each member of several runs the number of its run and its number in the run, int64."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - _bounds(counts)[owners]


def _tiles(spans: Sequence[tuple[int, int, int, int, int]], num_tiles: int) -> Tensor:
    """The tiles of all shadow rows, int32 [tiles, 6], and empty ones up to a number."""
    tiles = [
        (start, min(start + SHADOW_TILE, end), main_first, main_end, first, end)
        for _, main_first, main_end, first, end in spans
        for start in range(first, end, SHADOW_TILE)
    ]
    tiles += [(0,) * 6] * (num_tiles - len(tiles))
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 6)
