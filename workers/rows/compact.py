"""Compact plans: the live rows of a plan alone.

The places of masks are read on the host, so this is for CPUs, where that costs nothing and each row counts.

A canvas that verifies gets a shadow row for each slot of the active block, masked or not, because shadow rows
see each other; if they see only themselves, for committed slots alone. It gets none while nothing of the
block is committed, because no other row sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from remask.workers.attention.varlen import ShadowSegment, VarlenLayout, shadow_mask
from remask.workers.rows.pack import ActiveBlocks, Guidance
from remask.workers.rows.plan import Plan, Spare


def compacted(plan: Plan, blocks: ActiveBlocks) -> Plan:
    """The plan of one step, without spare rows, for a plan on the host and the active blocks of the step."""
    spare = plan.spare
    assert spare is not None, "the plan is compact already"
    valid, read, committed = (part.flatten() for part in (blocks.valid, blocks.read, blocks.committed))
    is_candidate = read[plan.main.slots]
    is_copied = committed[plan.copies.slots]
    is_read = committed[plan.shadows.slots]
    num_read = _counts(is_read, spare.cu_shadows)
    is_shadow = is_read | (valid[plan.shadows.slots] & _serves_others(spare, num_read))
    is_answered = torch.cat([is_candidate[: plan.num_main_slots], is_copied, is_read])
    num_candidates = _counts(is_candidate, plan.cu_main).tolist()
    plan = _with_copies(plan, is_copied, len(num_candidates))
    num_candidates += [1] * len(plan.copies.slots)
    shadows = plan.shadows.select(is_shadow)
    holes = blocks.rows.flatten()[shadows.slots] + shadows.shifts
    num_shadows = _counts(is_shadow, spare.cu_shadows)
    every, verifying = _segments(spare, holes, is_shadow, is_read, num_shadows.tolist(), num_read.tolist())
    cu_keys = plan.layout.cu_keys
    return replace(
        plan,
        layout=VarlenLayout(cu_keys, cu_keys, every),
        candidate_layout=VarlenLayout(_bounds(num_candidates), cu_keys, verifying),
        num_main_slots=int(is_candidate[: plan.num_main_slots].sum()),
        main=plan.main.select(is_candidate),
        shadows=shadows,
        read_shadows=is_read[is_shadow].nonzero().squeeze(1),
        guidance=_guidance(plan.guidance, torch.cat([is_candidate, is_copied, is_read]), is_answered)
        if plan.guidance is not None
        else None,
        slots_N=plan.slots_N[is_answered],
        spare=None,
    )


def _bounds(counts: Iterable[int]) -> tuple[int, ...]:
    return (0, *accumulate(counts))


def _counts(flags: Tensor, bounds: Tensor) -> Tensor:
    """How many flags are set between each two bounds."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))[bounds].diff()


def _serves_others(spare: Spare, num_read: Tensor) -> Tensor:
    """Which shadow rows are keys of rows that the head reads, bool [S]."""
    return spare.sees_block & (num_read > 0).repeat_interleave(spare.cu_shadows.diff())


def _with_copies(plan: Plan, is_copied: Tensor, num_blocks: int) -> Plan:
    """The plan with some of its copies; they follow `num_blocks` sequences of other kinds."""
    if is_copied.all():  # there may be none
        return plan
    bounds = plan.layout.cu_keys
    lens = torch.tensor(bounds).diff()
    is_kept = torch.cat([torch.ones(num_blocks, dtype=torch.bool), is_copied])
    is_row = is_kept.repeat_interleave(lens)
    cu_keys = _bounds(lens[is_kept].tolist())
    copies = plan.copies.select(is_copied)
    return replace(
        plan,
        token_index=plan.token_index[is_row],
        positions=plan.positions[is_row],
        is_hidden=plan.is_hidden[is_row] if plan.is_hidden is not None else None,
        layout=VarlenLayout(cu_keys, cu_keys, ()),
        copies=replace(
            copies, shifts=torch.tensor(cu_keys[num_blocks:-1], dtype=torch.int64) - copies.starts
        ),
    )


def _segments(
    spare: Spare,
    holes: Tensor,
    is_shadow: Tensor,
    is_read: Tensor,
    num_shadows: Sequence[int],
    num_read: Sequence[int],
) -> tuple[tuple[ShadowSegment, ...], tuple[ShadowSegment, ...]]:
    """The segments of all shadow rows as queries, and of those only that are read.

    Args:
        spare: the spare rows of the plan.
        holes: int64: for each shadow row that there is, the main row that it does not see.
        is_shadow, is_read: bool [S]: which shadow rows there are, and which of them the head reads.
        num_shadows, num_read: their number for each verifying sequence.
    """
    sees_block, is_read = spare.sees_block[is_shadow], is_read[is_shadow]
    every, read = [], []
    for (sequence, first, last, *_), keys, queries in zip(
        spare.spans, pairwise(_bounds(num_shadows)), pairwise(_bounds(num_read)), strict=True
    ):
        own = slice(*keys)
        if keys[0] == keys[1]:
            continue
        mask = shadow_mask(holes[own] - first, last - first, sees_block[own])
        every.append(ShadowSegment(sequence, keys, keys, mask))
        read.append(ShadowSegment(sequence, queries, keys, mask[is_read[own]]))
    return tuple(every), tuple(read)


def _guidance(guidance: Guidance, is_kept: Tensor, is_answered: Tensor) -> Guidance:
    """The hidden states that belong together, numbered among those that are kept."""
    numbers = is_kept.cumsum(0) - 1
    second = guidance.second[is_answered]
    return Guidance(
        first=numbers[guidance.first[is_answered]],
        second=torch.where(second >= 0, numbers[second], -1),
    )
