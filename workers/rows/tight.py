"""Tight packing: only the rows that a step needs. It needs mask counts on the host, so it is for CPUs.

A canvas that verifies gets a shadow row for each slot of the active block, masked or not, because shadow rows
see each other; if they see only themselves, for committed slots alone. It gets none while nothing of the
block is committed, because no other row sees them. A policy that needs exact leave-one-out probabilities gets
a copy of the sequence for each committed slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remask.scheduler.canvas import CanvasSpec
from remask.workers.attention.varlen import ShadowSegment, VarlenLayout, shadow_mask
from remask.workers.rows.pack import Guidance, HeadQuery, PackedRows, StepInputs, hidden_tokens


@dataclass(frozen=True)
class TightPlan:
    """The canvases of one pack. Slots are numbered as in the burst's flattened [R, B].

    The second copies of guided canvases are sequences of their own, behind those of all canvases.

    Attributes:
        num_canvases: sequences that are first copies.
        token_index: int64 [T_main]: where in the burst's flat tokens each main row's token stands.
        positions: int64 [T_main]: position ids.
        is_hidden: bool [T_main]: fixed tokens of second copies; None if there are none.
        cu_seqlens: boundaries of the sequences among the main rows.
        slots: int64 [M]: the slots that may be candidates, `block_length` of them for each sequence.
        is_guided: bool [M]: those of first copies that have a second.
        slot_shifts: int64 [M]: row of its token in the pack minus the token's place in the flat tokens.
        cu_slots: int64: boundaries of the sequences in `slots`.
        shadow_slots: int64 [S]: the slots that a shadow row may verify.
        shadow_starts: int64 [S]: where in the flat tokens the sequence of each of them begins.
        cu_shadow_slots: int64: boundaries of the verifying canvases in `shadow_slots`.
        shadow_owners: the place in the pack of each verifying canvas.
        sees_block: whether the shadow rows of each of these see each other.
        copy_slots: int64 [C]: the slots that a copy of the sequence may verify.
        copy_owners: int64 [C]: the place in the pack of each one's canvas.
        copy_starts: int64 [C]: where in the flat tokens its sequence begins.
    """

    num_canvases: int
    token_index: Tensor
    positions: Tensor
    is_hidden: Tensor | None
    cu_seqlens: tuple[int, ...]
    slots: Tensor
    is_guided: Tensor
    slot_shifts: Tensor
    cu_slots: Tensor
    shadow_slots: Tensor
    shadow_starts: Tensor
    cu_shadow_slots: Tensor
    shadow_owners: tuple[int, ...]
    sees_block: tuple[bool, ...]
    copy_slots: Tensor
    copy_owners: Tensor
    copy_starts: Tensor

    def pack(self, step: StepInputs) -> tuple[PackedRows, HeadQuery]:
        """See `Plan`; it holds no row too many."""
        tokens, blocks, mask_id = step.tokens, step.blocks, step.mask_id
        valid, masked, read_slots, places = (
            part.flatten() for part in (blocks.valid, blocks.masked, blocks.read, blocks.rows)
        )
        is_candidate = read_slots[self.slots]
        num_candidates = _counts(is_candidate, self.cu_slots).tolist()
        num_main_slots = sum(num_candidates[: self.num_canvases])
        main = self.slots[is_candidate]
        is_shadow, is_read = _needed_shadows(self, valid, masked)
        shadow = self.shadow_slots[is_shadow]
        shadow_positions = places[shadow] - self.shadow_starts[is_shadow]
        every, read = _shadow_segments(self, shadow_positions, is_shadow, is_read)
        shadow_candidates = is_read[is_shadow].nonzero().squeeze(1)
        ids_T = tokens[self.token_index]
        if self.is_hidden is not None:
            ids_T = ids_T.masked_fill(self.is_hidden, mask_id)
        copies = _copies(self, valid & ~masked, places, ids_T, mask_id)
        cu_seqlens = copies.cu_seqlens
        slots_N = torch.cat([main[:num_main_slots], copies.slots, shadow[shadow_candidates]])
        rows = PackedRows(
            ids_T=torch.cat([ids_T, copies.ids_T, torch.full_like(shadow, mask_id)]),
            positions_T=torch.cat([self.positions, copies.positions_T, shadow_positions]),
            layout=VarlenLayout(cu_seqlens, cu_seqlens, every),
            candidates_H=torch.cat(
                [
                    places[main] + self.slot_shifts[is_candidate],
                    copies.candidates,
                    shadow_candidates + cu_seqlens[-1],
                ]
            ),
            candidate_layout=VarlenLayout(
                (0, *itertools.accumulate([*num_candidates, *[1] * len(copies.slots)])), cu_seqlens, read
            ),
            slots_N=slots_N,
            num_main_slots=num_main_slots,
        )
        guidance = _guidance(self, is_candidate, len(main), rows) if self.is_hidden is not None else None
        return rows, step.ask(slots_N, num_main_slots, guidance)


def plan_tight(canvases: list[int], specs: Sequence[CanvasSpec], cu_tokens: Sequence[int]) -> TightPlan:
    """The plan for some canvases of a burst.

    Args:
        canvases: indices in the burst.
        specs: of all canvases of the burst.
        cu_tokens: boundaries of all sequences of the burst in its flat tokens.
    """
    width = max(spec.block_length for spec in specs)

    def ints(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    def joined(ranges: Iterable[range]) -> Tensor:
        return ints(itertools.chain(*ranges))

    def repeated(values: Sequence[int], counts: Sequence[int]) -> Tensor:
        return ints(values).repeat_interleave(ints(counts))

    guided = [c for c in canvases if specs[c].is_guided]
    sequences = [*canvases, *guided]
    starts = [cu_tokens[c] for c in sequences]
    lens = [cu_tokens[c + 1] - cu_tokens[c] for c in sequences]
    blocks = [specs[c].block_length for c in sequences]
    shadows = [specs[c].num_shadow_rows for c in canvases]
    copies = [specs[c].num_copies for c in canvases]
    second = range(len(canvases), len(sequences))
    cu_seqlens = (0, *itertools.accumulate(lens))
    has_second = [specs[c].is_guided for c in canvases] + [False] * len(guided)
    return TightPlan(
        num_canvases=len(canvases),
        token_index=joined(range(start, start + n) for start, n in zip(starts, lens, strict=True)),
        positions=joined(range(n) for n in lens),
        is_hidden=hidden_tokens(specs, sequences, lens, second) if guided else None,
        cu_seqlens=cu_seqlens,
        slots=joined(range(c * width, c * width + n) for c, n in zip(sequences, blocks, strict=True)),
        is_guided=repeated(has_second, blocks).bool(),
        slot_shifts=repeated([row - place for row, place in zip(cu_seqlens, starts, strict=False)], blocks),
        cu_slots=ints((0, *itertools.accumulate(blocks))),
        shadow_slots=joined(range(c * width, c * width + n) for c, n in zip(canvases, shadows, strict=True)),
        shadow_starts=repeated(starts[: len(canvases)], shadows),
        cu_shadow_slots=ints((0, *itertools.accumulate(n for n in shadows if n))),
        shadow_owners=tuple(place for place, n in enumerate(shadows) if n),
        sees_block=tuple(
            specs[c].shadows_see_each_other for c, n in zip(canvases, shadows, strict=True) if n
        ),
        copy_slots=joined(range(c * width, c * width + n) for c, n in zip(canvases, copies, strict=True)),
        copy_owners=repeated(range(len(canvases)), copies),
        copy_starts=repeated(starts[: len(canvases)], copies),
    )


@dataclass(frozen=True)
class _Copies:
    """Sequences once more, each with the token of one committed slot masked, behind the others of a pack.

    Attributes:
        ids_T, positions_T: int64: their rows.
        cu_seqlens: boundaries of all sequences of the pack, theirs included.
        slots: int64 [C]: the slot that each of them verifies.
        candidates: int64 [C]: that slot's row.
    """

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: tuple[int, ...]
    slots: Tensor
    candidates: Tensor


def _copies(plan: TightPlan, committed: Tensor, places: Tensor, ids_T: Tensor, mask_id: int) -> _Copies:
    """The copies that the committed slots of a pack need; `ids_T` are its main rows."""
    is_copied = committed[plan.copy_slots]
    slots = plan.copy_slots[is_copied]
    if not len(slots):
        return _Copies(ids_T[:0], ids_T[:0], plan.cu_seqlens, slots, slots)
    first = plan.cu_seqlens[-1]
    owners = plan.copy_owners[is_copied].tolist()
    bounds = [range(plan.cu_seqlens[owner], plan.cu_seqlens[owner + 1]) for owner in owners]
    ends = tuple(first + end for end in itertools.accumulate(map(len, bounds)))

    def ints(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=ids_T.device)

    sources = ints(itertools.chain(*bounds))
    candidates = places[slots] - plan.copy_starts[is_copied] + ints((first, *ends[:-1]))
    ids = ids_T[sources]
    ids[candidates - first] = mask_id
    return _Copies(ids, plan.positions[sources], plan.cu_seqlens + ends, slots, candidates)


def _guidance(plan: TightPlan, is_candidate: Tensor, num_main: int, rows: PackedRows) -> Guidance:
    """Second copies have the same candidates in the same order as the guided among the first."""
    first = torch.arange(len(rows.slots_N), device=rows.slots_N.device)
    first[rows.num_main_slots :] += num_main - rows.num_main_slots
    second = torch.full_like(first, -1)
    is_guided = plan.is_guided[is_candidate][: rows.num_main_slots].nonzero().squeeze(1)
    second[is_guided] = torch.arange(rows.num_main_slots, num_main, device=first.device)
    return Guidance(first, second)


def _counts(flags: Tensor, bounds: Tensor) -> Tensor:
    """How many flags are set between each two bounds."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))[bounds].diff()


def _needed_shadows(plan: TightPlan, valid: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `plan.shadow_slots` get a shadow row, and which of these rows the head reads, bool [S]."""
    in_block = valid[plan.shadow_slots]
    is_read = in_block & ~masked[plan.shadow_slots]
    # Rows that the head does not read serve as keys of the others.
    sees_block = torch.tensor(plan.sees_block, dtype=torch.bool, device=valid.device)
    whole = (_counts(is_read, plan.cu_shadow_slots) > 0) & sees_block
    return (in_block & whole.repeat_interleave(plan.cu_shadow_slots.diff())) | is_read, is_read


def _shadow_segments(
    plan: TightPlan, positions: Tensor, is_shadow: Tensor, is_read: Tensor
) -> tuple[tuple[ShadowSegment, ...], tuple[ShadowSegment, ...]]:
    """The segments of all shadow rows as queries, and of those only that are read."""
    cu_keys, cu_read = (
        (0, *itertools.accumulate(_counts(flags, plan.cu_shadow_slots).tolist()))
        for flags in (is_shadow, is_read)
    )
    read_rows = is_read[is_shadow]
    sees_block = torch.tensor(plan.sees_block, dtype=torch.bool, device=positions.device)
    every, read = [], []
    for i, sequence in enumerate(plan.shadow_owners):
        first, last = keys = cu_keys[i], cu_keys[i + 1]
        if first == last:
            continue
        length = plan.cu_seqlens[sequence + 1] - plan.cu_seqlens[sequence]
        mask = shadow_mask(positions[first:last], length, sees_block[i : i + 1])
        every.append(ShadowSegment(sequence, keys, keys, mask))
        read.append(ShadowSegment(sequence, (cu_read[i], cu_read[i + 1]), keys, mask[read_rows[first:last]]))
    return tuple(every), tuple(read)
