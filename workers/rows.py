"""Packing: the rows of many canvases in one forward, without padding, and which of them the head must look
at.

A *plan* says which canvases share a pack and holds what does not change while they are together; `pack_rows`
adds what the current step needs. Main rows (prompt and canvas) of all canvases come first, then one shadow
row for each block slot of the canvases whose remask policy verifies. The *candidates* are the rows that the
head may be asked about: the slots of the active blocks, then the shadow rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remask.workers.attention.varlen import ShadowSegment, VarlenLayout


@dataclass(frozen=True)
class PackedRows:
    """What a transformer gets: T rows, which of them see which, and the N candidates among them.

    Attributes:
        ids_T, positions_T: int64 [T].
        layout: all rows as queries.
        candidates_N: int64 [N]: rows whose final hidden state is wanted, main rows before shadow rows.
        candidate_layout: the candidates as queries.
    """

    ids_T: Tensor
    positions_T: Tensor
    layout: VarlenLayout
    candidates_N: Tensor
    candidate_layout: VarlenLayout


@dataclass(frozen=True)
class HeadQuery:
    """What the head is asked about the N candidates of a pack.

    Attributes:
        live: bool [N]: nobody reads the statistics of the others.
        given: int64 [N]: the token whose probability is wanted.
        temperature: fp32 [N]: of the proposal; 0: the most probable token.
        keys: int64 [N]: keys of the token stream.
        needs: which of "margin" and "entropy" somebody reads.
    """

    live: Tensor
    given: Tensor
    temperature: Tensor
    keys: Tensor
    needs: frozenset[str]


@dataclass(frozen=True)
class PackPlan:
    """The canvases of one pack. Slots are numbered as in the burst's flattened [R, B].

    Attributes:
        num_rows: rows of a forward, T.
        token_index: int64 [T_main]: where in the burst's flat tokens each main row's token stands.
        positions: int64 [T_main]: position ids.
        cu_seqlens: boundaries of the sequences among the main rows.
        slots: int64 [N_main]: the slot behind each main candidate, `block_length` of them for each canvas.
        slot_shifts: int64 [N_main]: row of its token in the pack minus the token's place in the flat tokens.
        cu_slots: boundaries of the sequences among the main candidates.
        shadow_slots: int64 [S]: the slot that each shadow row verifies.
        shadow_starts: int64 [S]: where in the flat tokens the sequence of each shadow row begins.
        shadow_owners: the place in the pack of each verifying canvas, with the number of its shadow rows.
    """

    num_rows: int
    token_index: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    slots: Tensor
    slot_shifts: Tensor
    cu_slots: tuple[int, ...]
    shadow_slots: Tensor
    shadow_starts: Tensor
    shadow_owners: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ActiveBlocks:
    """The active blocks of R canvases as tensors [R, B]; slots beyond a shorter block are not valid.

    Attributes:
        rows: place of each slot's token in the burst's flat tokens.
        valid: slots that belong to a block of a canvas that is not finished.
        tokens: ids in the slots.
        masked: valid slots that hold M.
    """

    rows: Tensor
    valid: Tensor
    tokens: Tensor
    masked: Tensor


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


def plan_pack(
    canvases: list[int],
    cu_tokens: Sequence[int],
    block_lens: Sequence[int],
    num_shadow_rows: Sequence[int],
    device: torch.device,
) -> PackPlan:
    """The plan for some canvases of a burst.

    Args:
        canvases: indices in the burst.
        cu_tokens: boundaries of all sequences of the burst in its flat tokens.
        block_lens: block length of each canvas of the burst.
        num_shadow_rows: of each canvas of the burst; 0 where its policy does not verify.
        device: where the tensors go.
    """
    width = max(block_lens)

    def joined(ranges: Sequence[range]) -> Tensor:
        return torch.tensor(list(itertools.chain(*ranges)), dtype=torch.int64, device=device)

    def repeated(values: Sequence[int], counts: Sequence[int]) -> Tensor:
        numbers, times = (torch.tensor(part, dtype=torch.int64, device=device) for part in (values, counts))
        return numbers.repeat_interleave(times)

    starts = [cu_tokens[c] for c in canvases]
    lens = [cu_tokens[c + 1] - cu_tokens[c] for c in canvases]
    blocks, shadows = [block_lens[c] for c in canvases], [num_shadow_rows[c] for c in canvases]
    cu_seqlens = (0, *itertools.accumulate(lens))
    return PackPlan(
        num_rows=sum(lens) + sum(shadows),
        token_index=joined([range(start, start + n) for start, n in zip(starts, lens, strict=True)]),
        positions=joined([range(n) for n in lens]),
        cu_seqlens=cu_seqlens,
        slots=joined([range(c * width, c * width + n) for c, n in zip(canvases, blocks, strict=True)]),
        slot_shifts=repeated([row - place for row, place in zip(cu_seqlens, starts, strict=False)], blocks),
        cu_slots=(0, *itertools.accumulate(blocks)),
        shadow_slots=joined(
            [range(c * width, c * width + n) for c, n in zip(canvases, shadows, strict=True)]
        ),
        shadow_starts=repeated(starts, shadows),
        shadow_owners=tuple((place, n) for place, n in enumerate(shadows) if n),
    )


def pack_rows(
    plan: PackPlan,
    tokens: Tensor,
    blocks: ActiveBlocks,
    *,
    mask_id: int,
    temperature: Tensor,
    keys: Tensor,
    needs: frozenset[str],
) -> tuple[PackedRows, HeadQuery]:
    """The rows of one forward, and what is asked about the candidates among them.

    Args:
        plan: the canvases of the pack.
        tokens: int64: the burst's flat tokens.
        blocks: the active blocks of all canvases of the burst.
        mask_id: M.
        temperature: fp32 [R] of all canvases of the burst.
        keys: int64 [R, B]: keys of the token stream.
        needs: statistics beyond the proposal's probability.
    """
    valid, masked, held, places = (
        part.flatten() for part in (blocks.valid, blocks.masked, blocks.tokens, blocks.rows)
    )
    heat = temperature.unsqueeze(1).expand_as(keys).flatten()
    own, shadow = plan.slots, plan.shadow_slots
    shadow_positions = torch.where(valid[shadow], places[shadow] - plan.shadow_starts, 0)
    shadow_rows = torch.arange(plan.num_rows - len(shadow), plan.num_rows, device=tokens.device)
    shadows = _shadow_segments(plan, shadow_positions, valid[shadow])
    rows = PackedRows(
        ids_T=torch.cat([tokens[plan.token_index], torch.full_like(shadow, mask_id)]),
        positions_T=torch.cat([plan.positions, shadow_positions]),
        layout=VarlenLayout(plan.cu_seqlens, plan.cu_seqlens, shadows),
        candidates_N=torch.cat([torch.where(valid[own], places[own] + plan.slot_shifts, 0), shadow_rows]),
        candidate_layout=VarlenLayout(plan.cu_slots, plan.cu_seqlens, shadows),
    )
    query = HeadQuery(
        live=torch.cat([masked[own], (valid & ~masked)[shadow]]),
        given=held[torch.cat([own, shadow])],
        temperature=torch.cat([heat[own], heat.new_zeros(len(shadow))]),  # shadow proposals are not used
        keys=keys.flatten()[torch.cat([own, shadow])],
        needs=needs,
    )
    return rows, query


def _shadow_segments(plan: PackPlan, positions_S: Tensor, valid_S: Tensor) -> tuple[ShadowSegment, ...]:
    """A shadow row sees all main rows but the one at its own position, and every shadow row of its block."""
    segments = []
    first = 0
    for sequence, count in plan.shadow_owners:
        own = slice(first, first + count)
        length = plan.cu_seqlens[sequence + 1] - plan.cu_seqlens[sequence]
        main = torch.ones(count, length, dtype=torch.bool, device=valid_S.device)
        main.scatter_(1, positions_S[own].unsqueeze(1), False)
        mask = torch.cat([main, valid_S[own].expand(count, count)], dim=1)
        segments.append(ShadowSegment(sequence, own.start, own.stop, mask))
        first += count
    return tuple(segments)
