"""Compact plans: the live rows of a plan alone.

The places of masks are read on the host, so this is for CPUs, where that costs nothing and each row counts.

A canvas that verifies gets a shadow row for each slot of the active block, masked or not, because shadow rows
see each other; if they see only themselves, for committed slots alone. It gets none while nothing of the
block is committed, because no other row sees them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from remask.workers.attention.varlen import ShadowSegment, VarlenLayout, shadow_mask
from remask.workers.rows.pack import ActiveBlocks, HiddenStates
from remask.workers.rows.plan import Plan, Spare


def compacted(plan: Plan, blocks: ActiveBlocks) -> Plan:
    """The plan of one step, without spare rows, for a plan on the host and the active blocks of the step."""
    spare = plan.spare
    assert spare is not None, "the plan is compact already"
    read, committed = blocks.read.flatten(), blocks.committed.flatten()
    is_candidate, is_copied = read[plan.main.slots], committed[plan.copies.slots]
    num_candidates = _counts(is_candidate, plan.cu_main).tolist()
    if len(is_copied):
        plan = _live_copies(plan, is_copied, len(num_candidates))
        num_candidates += [1] * len(plan.copies.slots)
    is_read = is_verified = committed[plan.shadows.slots]
    if plan.rows_of_slot > 1:  # the first answers
        is_read.view(-1, plan.rows_of_slot)[:, 1:] = False
        is_verified = is_read[:: plan.rows_of_slot]
    every: tuple[ShadowSegment, ...] = ()
    verifying: tuple[ShadowSegment, ...] = ()
    if len(is_read):
        plan, every, verifying = _live_shadows(plan, spare, blocks, is_read)
    is_answered = torch.cat([is_candidate[: plan.num_main_slots], is_copied, is_verified])
    cu_keys, cu_queries = plan.layout.cu_keys, _bounds(num_candidates)
    return replace(
        plan,
        layout=VarlenLayout(cu_keys, cu_keys, every, kept=plan.layout.kept),
        candidate_layout=VarlenLayout(cu_queries, cu_keys, verifying, kept=plan.layout.kept),
        num_main_slots=int(is_candidate[: plan.num_main_slots].sum()),
        main=plan.main.select(is_candidate),
        hidden=_hidden(plan.hidden, torch.cat([is_candidate, is_copied, is_read]), is_answered)
        if plan.hidden is not None and plan.hidden.second is not None
        else None,
        slots_N=plan.slots_N[is_answered],
        spare=None,
    )


def _bounds(counts: Iterable[int]) -> tuple[int, ...]:
    return (0, *accumulate(counts))


def _counts(flags: Tensor, bounds: np.ndarray) -> np.ndarray:
    """How many flags are set between each two bounds, int64."""
    before = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags.numpy(), out=before[1:])
    return np.diff(before[bounds])


def _live_copies(plan: Plan, is_copied: Tensor, num_blocks: int) -> Plan:
    """The plan with some of its copies; they follow `num_blocks` sequences of other kinds."""
    bounds = plan.layout.cu_keys
    assert plan.kept is None, "canvases that need copies reuse no keys"
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


def _live_shadows(
    plan: Plan, spare: Spare, blocks: ActiveBlocks, is_read: Tensor
) -> tuple[Plan, tuple[ShadowSegment, ...], tuple[ShadowSegment, ...]]:
    """The plan with the shadow rows of a step.

    Args:
        plan: with all shadow rows.
        spare: its spare rows.
        blocks: the active blocks.
        is_read: bool [S]: the shadow rows that the head reads.

    Returns:
        The plan, and the segments of all shadow rows as queries and of those that are read.
    """
    bounds = spare.cu_shadows
    num_read = _counts(is_read, bounds)
    # Rows that the head does not read are keys of the others.
    is_key = torch.from_numpy(np.repeat((num_read > 0) & spare.see_their_block, np.diff(bounds)))
    is_whole = is_read
    if plan.rows_of_slot > 1:
        is_whole = is_read[:: plan.rows_of_slot].repeat_interleave(plan.rows_of_slot)
    is_shadow = is_whole | (blocks.valid.flatten()[plan.shadows.slots] & is_key)
    shadows = plan.shadows.select(is_shadow)
    holes = blocks.rows.flatten()[shadows.slots] + shadows.shifts
    cu_keys, cu_read = (_bounds(counts.tolist()) for counts in (_counts(is_shadow, bounds), num_read))
    is_read = is_read[is_shadow]
    every, read = [], []
    for span, keys, queries in zip(spare.spans, pairwise(cu_keys), pairwise(cu_read), strict=True):
        own = slice(*keys)
        if keys[0] == keys[1]:
            continue
        mask = shadow_mask(holes[own] - span.first_main, span.end_main - span.first_main, span.sees)
        every.append(ShadowSegment(span.sequence, keys, keys, mask))
        read.append(ShadowSegment(span.sequence, queries, keys, mask[is_read[own]]))
    plan = replace(plan, shadows=shadows, read_shadows=is_read.nonzero().squeeze(1))
    return plan, tuple(every), tuple(read)


def _hidden(hidden: HiddenStates, is_kept: Tensor, is_answered: Tensor) -> HiddenStates:
    """The hidden states of slots that are answered for, numbered among those that are kept."""
    numbers = is_kept.cumsum(0) - 1
    assert hidden.second is not None, "a canvas is guided"
    second = hidden.second[is_answered]
    return HiddenStates(
        first=numbers[hidden.first[is_answered]],
        second=torch.where(second >= 0, numbers[second], -1),
    )
