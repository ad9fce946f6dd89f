"""The packer: makes the plan of a pack on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import CanvasSpec
from remask.workers.attention.varlen import (
    ITS_BLOCK,
    ITS_PAIR,
    ITSELF,
    SHADOW_TILE,
    DeviceLayout,
    ShadowSpan,
    VarlenLayout,
)
from remask.workers.rows.kept import NOTHING_KEPT, KeptCanvases, kept_places, kept_sequences
from remask.workers.rows.pack import hidden_states
from remask.workers.rows.padding import NO_PADDING, Padding
from remask.workers.rows.plan import Plan, Slots, Spare


def plan_pack(
    canvases: Sequence[int],
    specs: Sequence[CanvasSpec],
    bounds: np.ndarray,
    width: int,
    padding: Padding = NO_PADDING,
    kept: KeptCanvases = NOTHING_KEPT,
    *,
    gathers: bool = False,
) -> Plan:
    """The plan for some canvases of a burst, on the host.

    Args:
        canvases: indices in the burst.
        specs: of all canvases of the burst.
        bounds: of all sequences of the burst in its flat tokens, int64 [sequences + 1].
        width: B, the slots of the burst's widest block.
        padding: sizes that other bursts have. No canvas may be guided or need copies then. The padding
            belongs to the last canvas, and to the one before the first light forward.
        kept: of the canvases that reuse keys.
        gathers: whether kept rows are copied behind the pack's own keys, so that kernels see one array. Light
            forwards must come last then, behind second copies and copies.
    """
    guided = [c for c in canvases if specs[c].is_guided]
    copies_of = [c for c in canvases for _ in range(specs[c].num_copies)]
    assert padding == NO_PADDING or not (guided or copies_of), "they are not padded"
    with_block = [*canvases, *guided]
    sequences = np.array([*with_block, *copies_of])
    starts, lens = bounds[sequences], bounds[sequences + 1] - bounds[sequences]
    kept_rows = kept_sequences(kept, sequences.tolist(), lens.tolist(), len(canvases))
    light = {place: own.light for place, own in kept_rows.items() if own.light is not None}
    num_rows = lens.copy()
    for place, own in light.items():
        num_rows[place] = len(own.positions)
    cu_rows = _bounds(num_rows)
    key_lens = lens.copy()
    if light and padding.fresh_keys:
        key_lens[min(light) - 1] = padding.fresh_keys - cu_rows[min(light)]
    cu_keys = _bounds(key_lens) if gathers else cu_rows
    first_keys = cu_keys[:-1].copy()
    for place in light if not gathers else ():
        first_keys[place] = kept_rows[place].first
    num_blocks, num_copies = len(with_block), len(copies_of)
    # A canvas without rows, with which bursts are padded, has no candidates either.
    block_lens = np.array([specs[c].block_length for c in with_block]) * (lens[:num_blocks] > 0)
    shift = max(specs[c].shift for c in canvases)  # what fills up a burst has none
    rows_of_slot = 1 + (shift > 0)  # shadow rows, which follow each other
    num_shadows = np.array([specs[c].num_shadow_rows for c in canvases])
    cu_shadows = _bounds(num_shadows)

    def slots_of(places: np.ndarray, numbers: np.ndarray, firsts: np.ndarray, least: int = 0) -> Slots:
        """Slots given by the place of their sequence in the pack and their number in the block, padded with
        the first slot of the last canvas, at row 0. `firsts` are the first rows of the sequences."""
        begins = starts[places]
        table = np.array([sequences[places] * width + numbers, firsts[places] - begins, begins])
        if len(places) < least:
            filling = [[len(specs) * width - width], [-bounds[-2]], [bounds[-2]]]
            table = np.concatenate([table, np.repeat(filling, least - len(places), axis=1)], axis=1)
        slots, shifts, sequence_starts = torch.from_numpy(table).unbind()
        return Slots(slots, shifts, sequence_starts)

    main = slots_of(*_counted(block_lens), cu_rows, padding.slots)
    cu_blocks = _bounds(block_lens)
    for place, own in light.items():  # each slot has the row of its token, also where it is not valid
        slots = slice(cu_blocks[place], cu_blocks[place] + len(own.of_slots))
        main.starts.numpy()[slots] += own.positions[own.of_slots]
        main.shifts.numpy()[slots] += own.of_slots - own.positions[own.of_slots]
    copy_numbers = [i for c in canvases for i in range(specs[c].num_copies)]
    copies = slots_of(np.arange(num_copies) + num_blocks, np.array(copy_numbers, dtype=np.int64), cu_rows)
    owners, numbers = _counted(num_shadows)
    shadows = slots_of(owners, numbers // rows_of_slot, first_keys, padding.shadow_rows)
    (places,) = num_shadows.nonzero()
    first, end = first_keys[places], first_keys[places] + lens[places]
    see_each_other = np.array([specs[c].shadows_see_each_other for c in canvases])
    kinds = np.where(shift, ITS_PAIR, np.where(see_each_other, ITS_BLOCK, ITSELF))
    table = np.stack([places, first, end, cu_shadows[places], cu_shadows[places + 1], kinds[places]], axis=1)
    spans = tuple(ShadowSpan(*own) for own in table.tolist())
    sees = np.full(len(shadows.slots), ITSELF, dtype=np.int8)
    sees[: cu_shadows[-1]] = np.repeat(kinds, num_shadows)
    if shift:  # the second row of a pair
        sees[1 : cu_shadows[-1] : 2] = ITSELF
    num_first = int(block_lens[: len(canvases)].sum()) if guided else len(main.slots)
    slots_N = torch.cat([main.slots[:num_first], copies.slots, shadows.slots[::rows_of_slot]])
    hidden = None
    if guided or shift:
        is_guided = np.repeat([specs[c].is_guided for c in canvases], block_lens[: len(canvases)])
        num_answers = len(slots_N) - num_first - num_copies
        own = torch.from_numpy(is_guided) if guided else None
        hidden = hidden_states(num_first, len(main.slots), num_copies, num_answers, rows_of_slot, own)
    special = [c for c in canvases if specs[c].needs_logits]
    special_slots = np.isin(slots_N.numpy() // width, special).nonzero()[0] if special else None
    owners, numbers = _counted(num_rows)
    for place, own in light.items():
        numbers[cu_rows[place] : cu_rows[place + 1]] = own.positions
    num_more = max(0, padding.main_rows - len(owners))
    token_index = np.concatenate([starts[owners] + numbers, np.full(num_more, bounds[-1])])
    positions = np.concatenate([numbers, np.zeros(num_more, dtype=np.int64)])
    cu_queries = _bounds(np.concatenate([block_lens, np.ones(num_copies, dtype=np.int64)]))
    if padding != NO_PADDING:  # what fills up belongs to the last canvas, so that its numbers are defined
        cu_rows[-1] = len(token_index)
        cu_queries[-1] = len(main.slots)
    places = kept_places(kept_rows, lens, cu_rows, padding, gathers=gathers) if kept_rows else None
    if padding != NO_PADDING:
        cu_keys[-1] = len(token_index) if places is None else places.num_keys
    cu_rows_T, cu_queries_T, cu_keys_T = (
        torch.from_numpy(own.astype(np.int32)) for own in (cu_rows, cu_queries, cu_keys)
    )
    max_keys, max_queries = (
        max(int(lens.max()), padding.max_keys),
        max(int(block_lens.max()), padding.max_queries),
    )
    keys = tuple(cu_keys.tolist())
    seen = None
    if light and not gathers:
        first_and_end = zip(first_keys.tolist(), (first_keys + lens).tolist(), strict=True)
        seen = tuple(span if place in light else None for place, span in enumerate(first_and_end))
    reusing, num_main_rows, full_index = _reusing(canvases, specs, bounds, kept, padding)
    return Plan(
        token_index=torch.from_numpy(token_index),
        positions=torch.from_numpy(positions),
        is_hidden=_hidden_tokens(
            specs, sequences.tolist(), np.split(positions, cu_rows[1:-1]), range(len(canvases), num_blocks)
        )
        if guided
        else None,
        layout=VarlenLayout(
            tuple(cu_rows.tolist()),
            keys,
            (),
            DeviceLayout(cu_rows_T, cu_keys_T, max_keys, max_keys, None),
            kept=seen,
        ),
        candidate_layout=VarlenLayout(
            tuple(cu_queries.tolist()),
            keys,
            (),
            DeviceLayout(cu_queries_T, cu_keys_T, max_queries, max_keys, None),
            kept=seen,
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
            special=torch.from_numpy(special_slots) if special_slots is not None else None,
            max_special=sum(map(_max_live, (specs[c] for c in special))),
        ),
        shift=shift,
        reusing=reusing,
        num_main_rows=num_main_rows,
        full_index=full_index,
        kept=places,
    )


def _reusing(
    canvases: Sequence[int],
    specs: Sequence[CanvasSpec],
    cu_tokens: np.ndarray,
    kept: KeptCanvases,
    padding: Padding,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reusing`, `num_main_rows` and `full_index` of a plan."""
    reusing = [c for c in canvases if c in kept]
    num_rows = [specs[c].num_main_rows(int(cu_tokens[c + 1] - cu_tokens[c]), kept[c].light) for c in reusing]
    full = [np.arange(cu_tokens[c], cu_tokens[c + 1]) for c in reusing if kept[c].light is None]
    if not reusing:
        return None, None, None
    num_more = max(0, padding.group_size - len(reusing))
    reusing, num_rows = reusing + num_more * [len(specs) - 1], num_rows + num_more * [0]
    index = torch.from_numpy(np.concatenate(full)) if full else None
    return torch.tensor(reusing), torch.tensor(num_rows), index


def _hidden_tokens(
    specs: Sequence[CanvasSpec], sequences: Sequence[int], positions: Sequence[np.ndarray], second: range
) -> Tensor:
    """Which main rows hold a fixed token of a second copy, bool [T_main].

    Args:
        specs: of all canvases of the burst.
        sequences: the canvas of each sequence of the pack.
        positions: of the rows of each.
        second: which of them are second copies.
    """
    flags = [np.zeros(len(own), dtype=bool) for own in positions]
    for place in second:
        flags[place][:] = ~np.isin(positions[place], specs[sequences[place]].slot_array)
    return torch.from_numpy(np.concatenate(flags))


def _max_live(spec: CanvasSpec) -> int:
    """How many of a canvas's rows the head is asked about in one step, at most."""
    if_committed = spec.reads_committed_rows + (spec.num_shadow_rows > 0) + (spec.num_copies > 0)
    return spec.block_length * max(1, if_committed)


def _bounds(counts: np.ndarray) -> np.ndarray:
    """Where each of several runs begins, and where the last ends, int64 [runs + 1]."""
    found = np.zeros(len(counts) + 1, dtype=np.int64)
    counts.cumsum(out=found[1:])
    return found


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each member of several runs the number of its run and its number in the run, int64."""
    firsts = counts.cumsum(dtype=np.int64) - counts
    owners = np.arange(len(counts)).repeat(counts)
    return owners, np.arange(len(owners)) - firsts[owners]


def _tiles(spans: Sequence[ShadowSpan], num_tiles: int) -> Tensor:
    """The tiles of all shadow rows, int32 [tiles, 6], and empty ones up to a number."""
    tiles = [
        (start, min(start + SHADOW_TILE, own.end), own.first_main, own.end_main, own.first, own.end)
        for own in spans
        for start in range(own.first, own.end, SHADOW_TILE)
    ]
    tiles += [(0,) * 6] * (num_tiles - len(tiles))
    return torch.from_numpy(np.array(tiles, dtype=np.int32).reshape(-1, 6))
