"""Packing in fixed shapes, for devices that the host must not wait for.

Where masks are is only known on the device, so a pack has room for all that a step may need: a candidate row
for every slot of the active blocks, a shadow row for every slot of those that verify, and for those that ask
for the exact answer a copy of the sequence for every slot. Which of them count is data, as is the place of
the active blocks. A plan is made on the host, from what it knows of the canvases, and holds for as long as
they are together; `pack` runs on the device and never looks back.

A plan may be larger than its canvases need (`Room`): plans of equal sizes can share buffers, and the graph
that was captured on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remask.scheduler.canvas import TOKEN, CanvasSpec
from remask.workers.attention.varlen import SHADOW_TILE, DeviceLayout, DeviceShadows, VarlenLayout
from remask.workers.room import NO_ROOM, Room
from remask.workers.rows import ActiveBlocks, Guidance, HeadQuery, PackedRows
from remask.workers.sampling import SamplingTables


@dataclass(frozen=True)
class FixedPlan:
    """The canvases of one pack. Slots are numbered as in the burst's flattened [R, B].

    The sequences are those of all canvases, second copies of the guided ones, then the copies that the exact
    answer needs. Places are those of tokens in the burst's flat tokens; a row's *shift* is the row of its
    token in the pack minus the token's place.

    Attributes:
        token_index, positions: int64 [T_main]: place and position of each main row.
        is_hidden: bool [T_main]: fixed tokens of second copies; None where there are none.
        cu_queries, cu_keys: boundaries of the sequences among candidates and main rows, on the host.
        rows, candidates: the layouts on the device: of all rows as queries, and of the candidates.
        num_main_slots: slots of first copies.
        slots, shifts, starts: int64 [M]: slots of first and second copies, with the shifts and first places
            of their sequences.
        copy_slots, copy_shifts, copy_starts: int64 [C]: likewise, of the copies.
        shadow_slots, shadow_shifts, shadow_starts: int64 [S]: likewise, of shadow rows (rows of the main
            sequence).
        sees_block: bool [S].
        tiles: see `DeviceShadows`.
        guidance: which hidden states belong together; None where nobody is guided.
        special: int64: which of the N slots need more than the fused head does; None: none.
        slots_N: int64 [N]: the slots that are answered for.
    """

    token_index: Tensor
    positions: Tensor
    is_hidden: Tensor | None
    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    rows: DeviceLayout
    candidates: DeviceLayout
    num_main_slots: int
    slots: Tensor
    shifts: Tensor
    starts: Tensor
    copy_slots: Tensor
    copy_shifts: Tensor
    copy_starts: Tensor
    shadow_slots: Tensor
    shadow_shifts: Tensor
    shadow_starts: Tensor
    sees_block: Tensor
    tiles: Tensor
    guidance: Guidance | None
    special: Tensor | None
    slots_N: Tensor

    def pack(
        self,
        tokens: Tensor,
        blocks: ActiveBlocks,
        *,
        mask_id: int,
        sampling: SamplingTables,
        keys: Tensor,
        needs: frozenset[str],
        removed: Tensor | None,
    ) -> tuple[PackedRows, HeadQuery]:
        """As `PackPlan.pack`."""
        valid, masked, read, held, places = (
            part.flatten() for part in (blocks.valid, blocks.masked, blocks.read, blocks.tokens, blocks.rows)
        )

        def place(slots: Tensor, starts: Tensor) -> Tensor:
            """Where the slots' tokens stand; what is no slot has the first place of its sequence."""
            return torch.where(valid[slots], places[slots], starts)

        ids = tokens[self.token_index]
        if self.is_hidden is not None:
            ids = ids.masked_fill(self.is_hidden, mask_id)
        copied = place(self.copy_slots, self.copy_starts) + self.copy_shifts
        ids = ids.scatter(0, copied, mask_id)
        shadow = place(self.shadow_slots, self.shadow_starts)
        shadow_rows = torch.arange(len(self.shadow_slots), device=tokens.device) + len(ids)
        shadows = None
        if len(self.shadow_slots):
            shadows = DeviceShadows(
                tiles=self.tiles,
                holes=(shadow + self.shadow_shifts).int(),
                is_key=valid[self.shadow_slots],
                sees_block=self.sees_block,
            )
        rows = PackedRows(
            ids_T=torch.cat([ids, torch.full_like(self.shadow_slots, mask_id)]),
            positions_T=torch.cat([self.positions, shadow - self.shadow_starts]),
            layout=self._layout(self.cu_keys, self.rows, shadows),
            candidates_H=torch.cat([place(self.slots, self.starts) + self.shifts, copied, shadow_rows]),
            candidate_layout=self._layout(self.cu_queries, self.candidates, shadows),
            slots_N=self.slots_N,
            num_main_slots=self.num_main_slots,
        )
        owners = self.slots_N // keys.shape[1]
        committed = valid & ~masked
        is_main = torch.arange(len(owners), device=owners.device) < self.num_main_slots
        query = HeadQuery(
            owners=owners,
            sampling=sampling,
            given=held[self.slots_N],
            # Proposals of rows that verify are not used.
            temperature=torch.where(is_main, sampling.temperature[owners], 0.0),
            keys=keys.flatten()[self.slots_N],
            needs=needs,
            guidance=self.guidance,
            removed=removed.flatten(0, 1)[self.slots_N] if removed is not None else None,
            live=torch.where(is_main, read[self.slots_N], committed[self.slots_N]),
            special=self.special,
        )
        return rows, query

    def _layout(
        self, cu_queries: tuple[int, ...], layout: DeviceLayout, shadows: DeviceShadows | None
    ) -> VarlenLayout:
        device = DeviceLayout(layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys, shadows)
        return VarlenLayout(cu_queries, self.cu_keys, (), device)


class _Slots(NamedTuple):
    """Slots of some sequences' active blocks, with the shifts and first places of these."""

    slots: NDArray[np.int64]
    shifts: NDArray[np.int64]
    starts: NDArray[np.int64]


def plan_fixed(
    canvases: Sequence[int], specs: Sequence[CanvasSpec], cu_tokens: Sequence[int], room: Room = NO_ROOM
) -> FixedPlan:
    """The plan for some canvases of a burst, on the host.

    Args:
        canvases: indices in the burst.
        specs: of all canvases of the burst.
        cu_tokens: boundaries of all sequences of the burst in its flat tokens.
        room: sizes that other bursts have. Rows and slots are then filled up with those of the burst's last
            canvas, which must have ended.
    """
    width = max(room.widest, max(spec.block_length for spec in specs))
    guided = [c for c in canvases if specs[c].is_guided]
    copied = [c for c in canvases for _ in range(specs[c].num_copies)]
    sequences = [*canvases, *guided, *copied]
    lens = [cu_tokens[c + 1] - cu_tokens[c] for c in sequences]
    cu_keys = (0, *itertools.accumulate(lens))
    shifts = [row - cu_tokens[c] for row, c in zip(cu_keys, sequences, strict=False)]
    num_blocks = len(canvases) + len(guided)
    block_lens = [specs[c].block_length for c in sequences[:num_blocks]]
    cu_queries = (0, *itertools.accumulate([*block_lens, *[1] * len(copied)]))
    pad_slot = len(specs) * width - width  # the first slot of the last canvas
    pad_start = cu_tokens[-2]

    def slots_of(which: Sequence[int], counts: Sequence[int], own: Sequence[int], size: int = 0) -> _Slots:
        """The first slots of canvases, so many each, and padding."""
        filled = sum(counts)
        pad = max(0, size - filled)
        return _Slots(
            np.array(
                [c * width + i for c, n in zip(which, counts, strict=True) for i in range(n)]
                + [pad_slot] * pad,
                dtype=np.int64,
            ),
            np.array(
                [s for s, n in zip(own, counts, strict=True) for _ in range(n)] + [-pad_start] * pad,
                dtype=np.int64,
            ),
            np.array(
                [cu_tokens[c] for c, n in zip(which, counts, strict=True) for _ in range(n)]
                + [pad_start] * pad,
                dtype=np.int64,
            ),
        )

    main = slots_of(sequences[:num_blocks], block_lens, shifts[:num_blocks], room.slots)
    copies = _copy_slots(copied, width, shifts[num_blocks:], cu_tokens)
    num_shadows = [specs[c].num_shadow_rows for c in canvases]
    shadow = slots_of(canvases, num_shadows, shifts[: len(canvases)], room.shadow_rows)
    sees_block = np.zeros(len(shadow.slots), dtype=bool)
    sees_block[: sum(num_shadows)] = np.repeat(
        [specs[c].shadows_see_each_other for c in canvases], num_shadows
    )
    num_first = sum(block_lens[: len(canvases)]) if guided else len(main.slots)
    slots_N = np.concatenate([main.slots[:num_first], copies.slots, shadow.slots])
    pad_rows = max(0, room.main_rows - cu_keys[-1])
    special = np.isin(slots_N // width, [c for c in canvases if specs[c].needs_logits])
    longest, widest = max(*lens, room.longest), max(*block_lens, room.widest)
    cu_keys_T, cu_queries_T = (torch.tensor(bounds, dtype=torch.int32) for bounds in (cu_keys, cu_queries))
    return FixedPlan(
        token_index=_joined([cu_tokens[c] for c in sequences], lens, pad=[cu_tokens[-1]] * pad_rows),
        positions=_joined([0] * len(lens), lens, pad=[0] * pad_rows),
        is_hidden=_fixed_tokens(specs, sequences, lens, range(len(canvases), num_blocks)) if guided else None,
        cu_queries=cu_queries,
        cu_keys=cu_keys,
        rows=DeviceLayout(cu_keys_T, cu_keys_T, longest, longest, None),
        candidates=DeviceLayout(cu_queries_T, cu_keys_T, widest, longest, None),
        num_main_slots=num_first,
        slots=torch.from_numpy(main.slots),
        shifts=torch.from_numpy(main.shifts),
        starts=torch.from_numpy(main.starts),
        copy_slots=torch.from_numpy(copies.slots),
        copy_shifts=torch.from_numpy(copies.shifts),
        copy_starts=torch.from_numpy(copies.starts),
        shadow_slots=torch.from_numpy(shadow.slots),
        shadow_shifts=torch.from_numpy(shadow.shifts),
        shadow_starts=torch.from_numpy(shadow.starts),
        sees_block=torch.from_numpy(sees_block),
        tiles=_tiles(num_shadows, cu_keys, room.shadow_rows),
        guidance=_guidance(specs, canvases, block_lens, len(main.slots), len(slots_N)) if guided else None,
        special=torch.from_numpy(special.nonzero()[0]) if special.any() else None,
        slots_N=torch.from_numpy(slots_N),
    )


def _joined(starts: Sequence[int], lens: Sequence[int], pad: list[int]) -> Tensor:
    ranges = (range(start, start + n) for start, n in zip(starts, lens, strict=True))
    return torch.tensor([*itertools.chain(*ranges), *pad], dtype=torch.int64)


def _copy_slots(copied: Sequence[int], width: int, shifts: Sequence[int], cu_tokens: Sequence[int]) -> _Slots:
    """The slot that each copy verifies: those of a canvas in order."""
    numbers = [i for _, group in itertools.groupby(copied) for i, _ in enumerate(group)]
    return _Slots(
        np.array([c * width + i for c, i in zip(copied, numbers, strict=True)], dtype=np.int64),
        np.array(shifts, dtype=np.int64),
        np.array([cu_tokens[c] for c in copied], dtype=np.int64),
    )


def _fixed_tokens(
    specs: Sequence[CanvasSpec], sequences: Sequence[int], lens: Sequence[int], second: range
) -> Tensor:
    """Which main rows hold a fixed token of a second copy, bool [T_main]."""
    flags = [np.zeros(length, dtype=bool) for length in lens]
    for place in second:
        flags[place][:] = True
        flags[place][np.frombuffer(specs[sequences[place]].slots, TOKEN)] = False
    return torch.from_numpy(np.concatenate(flags))


def _tiles(num_shadows: Sequence[int], cu_keys: Sequence[int], room: int) -> Tensor:
    """The tiles of all shadow rows, int32 [tiles, 6]; with room, as many as that number can need."""
    tiles, first = [], 0
    for place, count in enumerate(num_shadows):
        end = first + count
        tiles += [
            (start, min(start + SHADOW_TILE, end), cu_keys[place], cu_keys[place + 1], first, end)
            for start in range(first, end, SHADOW_TILE)
        ]
        first = end
    if room:
        tiles += [(0,) * 6] * (room // SHADOW_TILE + len(num_shadows) - len(tiles))
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 6)


def _guidance(
    specs: Sequence[CanvasSpec], canvases: Sequence[int], block_lens: Sequence[int], num_main: int, count: int
) -> Guidance:
    """Second copies have their slots in the order of the guided among the first."""
    num_first = sum(block_lens[: len(canvases)])
    first = torch.arange(count)
    first[num_first:] += num_main - num_first
    is_guided = np.repeat([specs[c].is_guided for c in canvases], block_lens[: len(canvases)])
    second = torch.full((count,), -1)
    second[:num_first][torch.from_numpy(is_guided)] = torch.arange(num_first, num_main)
    return Guidance(first, second)
