"""Packing: the rows of many canvases in one forward, without padding, and which of them the head must look
at.

A *plan* says which canvases share a pack and holds what does not change while they are together; `pack_rows`
adds what the current step needs. Main rows (prompt and canvas) of all canvases come first, then one shadow
row for each block slot of the canvases whose remask policy verifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remask.workers.attention.varlen import ShadowSegment, VarlenLayout


@dataclass(frozen=True)
class HeadQuery:
    """N rows of a pack that the head is asked about (R x B main slots, then the shadow slots).

    Attributes:
        rows: int64 [N]: rows of the pack.
        live: bool [N]: the others are padding; their statistics mean nothing.
        given: int64 [N]: the token whose probability is wanted.
        temperature: fp32 [N]: of the proposal; 0: the most probable token.
        keys: int64 [N]: keys of the token stream.
        needs: which of "margin" and "entropy" somebody reads.
    """

    rows: Tensor
    live: Tensor
    given: Tensor
    temperature: Tensor
    keys: Tensor
    needs: frozenset[str]


@dataclass(frozen=True)
class RowPack:
    """What a model gets: rows, which of them see which, and what is asked about them."""

    ids_T: Tensor
    positions_T: Tensor
    layout: VarlenLayout
    query: HeadQuery


@dataclass(frozen=True)
class PackPlan:
    """The canvases of one pack.

    Attributes:
        canvases: int64 [Rp]: indices in the burst.
        verifying: the places among them (0..Rp-1) of canvases with shadow rows.
        verifying_canvases: int64 [Rv]: their indices in the burst.
        token_index: int64 [T_main]: where in the burst's flat tokens each main row's token stands.
        positions: int64 [T_main]: position ids.
        cu_seqlens: boundaries of the sequences among the main rows.
        row_shift: int64 [Rp, 1]: row of a token in the pack minus its place in the flat tokens.
        starts: int64 [Rp, 1]: first row of each sequence in the pack.
    """

    canvases: Tensor
    verifying: tuple[int, ...]
    verifying_canvases: Tensor
    token_index: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    row_shift: Tensor
    starts: Tensor


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
    canvases: list[int], cu_tokens: Sequence[int], verifies: Sequence[bool], device: torch.device
) -> PackPlan:
    """The plan for some canvases of a burst whose flat tokens are bounded by `cu_tokens`."""
    lens = [cu_tokens[c + 1] - cu_tokens[c] for c in canvases]
    cu_seqlens = [0]
    for length in lens:
        cu_seqlens.append(cu_seqlens[-1] + length)
    verifying = tuple(place for place, c in enumerate(canvases) if verifies[c])
    starts = torch.tensor(cu_seqlens[:-1], device=device).unsqueeze(1)
    return PackPlan(
        canvases=torch.tensor(canvases, device=device),
        verifying=verifying,
        verifying_canvases=torch.tensor(
            [canvases[place] for place in verifying], dtype=torch.int64, device=device
        ),
        token_index=torch.cat(
            [torch.arange(cu_tokens[c], cu_tokens[c + 1], device=device) for c in canvases]
        ),
        positions=torch.cat([torch.arange(length, device=device) for length in lens]),
        cu_seqlens=tuple(cu_seqlens),
        row_shift=starts - torch.tensor([cu_tokens[c] for c in canvases], device=device).unsqueeze(1),
        starts=starts,
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
) -> RowPack:
    """The rows of one forward.

    Args:
        plan: the canvases of the pack.
        tokens: int64: the burst's flat tokens.
        blocks: the active blocks of all canvases of the burst.
        mask_id: M.
        temperature: fp32 [R] of all canvases of the burst.
        keys: int64 [R, B]: keys of the token stream.
        needs: statistics beyond the proposal's probability.
    """
    main = plan.canvases
    valid, slot_tokens, masked = blocks.valid[main], blocks.tokens[main], blocks.masked[main]
    slot_rows = torch.where(valid, blocks.rows[main] + plan.row_shift, 0)
    block_len = valid.shape[1]
    heat = temperature[main].unsqueeze(1).expand_as(slot_rows)
    query = [slot_rows, masked, slot_tokens, heat, keys[main]]
    ids, positions = tokens[plan.token_index], plan.positions
    shadows: list[ShadowSegment] = []
    if plan.verifying:
        which = torch.tensor(plan.verifying, device=tokens.device)
        num_main = plan.cu_seqlens[-1]
        shadow_rows = torch.arange(num_main, num_main + len(plan.verifying) * block_len, device=tokens.device)
        ids = torch.cat([ids, ids.new_full((len(shadow_rows),), mask_id)])
        shadow_positions = torch.where(valid[which], slot_rows[which] - plan.starts[which], 0)
        positions = torch.cat([positions, shadow_positions.flatten()])
        shadows = [
            _shadow_segment(plan, i, place, shadow_positions[i], valid[place])
            for i, place in enumerate(plan.verifying)
        ]
        zeros = torch.zeros_like(keys[plan.verifying_canvases])
        shadow_query = [
            shadow_rows.view(-1, block_len),
            (valid & ~masked)[which],
            slot_tokens[which],
            zeros.to(heat.dtype),
            zeros,
        ]
        query = [torch.cat(pair) for pair in zip(query, shadow_query, strict=True)]
    rows, live, given, heat, token_keys = (part.flatten() for part in query)
    return RowPack(
        ids,
        positions,
        VarlenLayout(plan.cu_seqlens, tuple(shadows)),
        HeadQuery(rows, live, given, heat, token_keys, needs),
    )


def _shadow_segment(
    plan: PackPlan, index: int, place: int, own_positions: Tensor, valid: Tensor
) -> ShadowSegment:
    """Shadow row j sees all main rows but the one at its own position, and every shadow row of its block."""
    start, end = plan.cu_seqlens[place], plan.cu_seqlens[place + 1]
    block_len = len(valid)
    main = torch.ones(block_len, end - start, dtype=torch.bool, device=valid.device)
    main.scatter_(1, own_positions.unsqueeze(1), False)
    first = plan.cu_seqlens[-1] + index * block_len
    mask = torch.cat([main, valid.expand(block_len, block_len)], dim=1)
    return ShadowSegment(start, end, first, first + block_len, mask)
