"""The denoising step: rows, forward, statistics, strategies, canvas update, for all canvases of a burst at
once.

Everything but the choice of packs is tensor arithmetic of static shape over [R, B]. No number of one canvas
enters the decision about another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import NO_COMMIT, NOT_NUMBERS, CanvasSpec
from remask.scheduler.light_rows import LightRows
from remask.workers.burst.state import BurstState
from remask.workers.decide import Outcome, decide
from remask.workers.head import Statistics
from remask.workers.keyed_random import Purpose, stream_keys, uniform_at
from remask.workers.models.denoiser import Denoiser
from remask.workers.rows.compact import compacted
from remask.workers.rows.kept import NOTHING_KEPT, KeptCanvases
from remask.workers.rows.pack import ActiveBlocks, HeadQuery, PackedRows, StepInputs, group_canvases
from remask.workers.rows.packer import plan_pack
from remask.workers.rows.plan import Plan
from remask.workers.rows.repeats import may_repeat, without_repeats
from remask.workers.strategies.view import BlockView, prob

Plans: TypeAlias = Sequence[Plan]


def plan_packs(
    state: BurstState,
    model: Denoiser,
    pack_rows: int,
    kept: KeptCanvases = NOTHING_KEPT,
    canvases: Sequence[int] | None = None,
) -> Plans:
    """Divides canvases into packs of at most `pack_rows` rows; a larger canvas is a pack of its own. The
    plans are on the host, as the state still is.

    Args:
        state: of the burst.
        model: the model.
        pack_rows: see above.
        kept: rows of the canvases that reuse keys; those without take no step.
        canvases: their places; None: those that run.
    """
    specs = state.specs
    if canvases is None:
        canvases = (~state.paused).nonzero().squeeze(1).tolist()
    assert all(specs[c].shift == model.config.shift for c in canvases), "canvases are the model's"
    light = {c: kept[c].light if c in kept else None for c in canvases if specs[c].reuse is None or c in kept}
    num_rows = {c: specs[c].num_rows(state.sequence_len(c), own) for c, own in light.items()}
    plans, cu_tokens = [], np.array(state.cu_tokens)
    for part in _apart(light, specs, static=model.static_shapes):
        for group in group_canvases(num_rows, part, pack_rows):
            gathers = model.static_shapes
            plan = plan_pack(group, specs, cu_tokens, state.max_block_len, kept=kept, gathers=gathers)
            # A pack that keeps keys is not searched for equal sequences.
            if not model.static_shapes and plan.kept is None:
                plan = replace(plan, may_repeat=may_repeat(group, state))
            plans.append(plan)
    return plans


def _apart(
    light: Mapping[int, LightRows | None], specs: Sequence[CanvasSpec], *, static: bool
) -> list[list[int]]:
    """Canvases in the parts of which packs are cut. On a host those that reuse keys have packs of their own.
    With static shapes light forwards must come last in a pack, behind other sequences of its canvases too
    (see `plan_pack`): if there are any, canvases with several sequences have packs of their own, of one kind
    each."""
    if not static:
        return [[c for c in light if (specs[c].reuse is None) == is_exact] for is_exact in (True, False)]
    if not any(light.values()):
        return [list(light)]
    parts: dict[tuple[bool, bool], list[int]] = {}
    for c in sorted(light, key=lambda c: light[c] is not None):
        has_more = specs[c].is_guided or specs[c].num_copies > 0
        parts.setdefault((has_more, has_more and light[c] is not None), []).append(c)
    return list(parts.values())


def plan_keys(
    state: BurstState, canvases: Sequence[int], kept: KeptCanvases, model: Denoiser, pack_rows: int
) -> Plans:
    """Plans to make the keys of the last full forwards of some canvases again. Their rows are those of that
    forward, the shadow rows included, so that all products have its shapes."""
    return plan_packs(state, model, pack_rows, {c: kept[c]._replace(light=None) for c in canvases}, canvases)


def make_keys(state: BurstState, plans: Plans, model: Denoiser) -> int:
    """Makes keys by plans from `plan_keys`; returns the rows forwarded."""
    if not plans:
        return 0
    assert state.full_tokens is not None, "canvases reuse keys"
    slots, valid = state.active_slots()
    blocks = state.active_blocks(slots, valid, model.mask_id, state.full_tokens)
    none = frozenset[str]()
    step = StepInputs(state.full_tokens, blocks, model.mask_id, state.sampling, None, none, state.removed)
    num_rows = 0
    for plan in plans:
        rows, _ = pack(plan, step, model)
        model.make_keys(rows)
        num_rows += len(rows.ids_T)
    return num_rows


def pack(plan: Plan, step: StepInputs, model: Denoiser) -> tuple[PackedRows, HeadQuery]:
    """The rows of one forward and the questions about its candidates: the live rows alone, unless the model
    needs static shapes."""
    return (plan if model.static_shapes else compacted(plan, step.blocks)).pack(step)


def denoise(state: BurstState, plans: Plans, model: Denoiser) -> int:
    """One step of every canvas of the plans, in place; returns the rows forwarded."""
    slots, valid = state.active_slots()
    blocks = state.active_blocks(slots, valid, model.mask_id)
    shape = slots.shape
    main = Statistics.blank(slots.numel(), state.device)
    log_verified = torch.zeros(shape, device=state.device)
    keys = _keys(state, Purpose.TOKEN, slots) if state.sampling.any_hot else None
    num_rows = 0
    step = StepInputs(state.tokens, blocks, model.mask_id, state.sampling, keys, state.needs, state.removed)
    for plan in plans:
        rows, query = pack(plan, step, model)
        _note_reuse(state, plan)
        if plan.may_repeat:
            rows = without_repeats(rows)
        found = model.statistics(rows, query)
        num_rows += len(rows.ids_T)
        own, verifying = slice(rows.num_main_slots), slice(rows.num_main_slots, None)
        main.put(rows.slots_N[own], found.part(own))
        log_verified.view(-1)[rows.slots_N[verifying]] = found.log_given[verifying]
    view = _block_view(state, blocks, main, log_verified, slots)
    outcome = _without_faults(state, blocks, view, main, decide(state, view))
    _update(state, slots, blocks, view, main, outcome, model.mask_id)
    if model.static_shapes and (are_light := state.are_light()) is not None:
        # The host has planned the rows of the burst's later steps.
        state.paused |= state.reuses & ~are_light
    return num_rows


def _note_reuse(state: BurstState, plan: Plan) -> None:
    """Notes what a forward of canvases that reuse keys makes: their keys, of these tokens, and its rows."""
    if plan.reusing is None or plan.num_main_rows is None or state.full_tokens is None:
        return
    state.num_main_rows.index_copy_(0, plan.reusing, plan.num_main_rows)
    if plan.full_index is not None:
        state.full_tokens[plan.full_index] = state.tokens[plan.full_index]


def _keys(state: BurstState, purpose: Purpose, slots: Tensor) -> Tensor:
    """Keys of a stream of random numbers for this step, int64 [R, B]."""
    return stream_keys(state.keys.unsqueeze(1), purpose, state.num_forwards.unsqueeze(1), slots)


def _block_view(
    state: BurstState, blocks: ActiveBlocks, main: Statistics, log_verified: Tensor, slots: Tensor
) -> BlockView:
    shape = slots.shape
    log_confidence = torch.where(
        state.sampling.rank_by_top.unsqueeze(1), main.log_top.view(shape), main.log_proposal.view(shape)
    )
    committed = blocks.committed
    unread = torch.zeros(shape, device=state.device)
    order, accept, remask_draw = (
        uniform_at(_keys(state, purpose, slots)) if purpose.name.lower() in state.random_streams else unread
        for purpose in (Purpose.ORDER, Purpose.ACCEPT, Purpose.REMASK)
    )
    return BlockView(
        masked=blocks.masked,
        committed=committed,
        log_confidence=torch.where(blocks.masked, log_confidence, -torch.inf),
        log_verified=torch.where(committed, log_verified, 0.0),
        log_margin=main.log_margin.view(shape),
        neg_entropy=main.neg_entropy.view(shape),
        log_visible=torch.where(blocks.read & committed, main.log_given.view(shape), 0.0),
        log_top=torch.where(blocks.read, main.log_top.view(shape), -torch.inf),
        order=order,
        accept=accept,
        remask_draw=remask_draw,
        block_forwards=state.block_forwards,
    )


def _without_faults(
    state: BurstState, blocks: ActiveBlocks, view: BlockView, main: Statistics, outcome: Outcome
) -> Outcome:
    """The decisions about canvases without a fault. A canvas with a fault pauses and does not change."""
    shape, running = blocks.masked.shape, ~state.paused
    unread = main.log_top.view(shape).isnan() | main.log_proposal.view(shape).isnan()
    is_nan = running & ((unread & blocks.read) | view.log_verified.isnan()).any(1)
    is_idle = state.always_commits & blocks.masked.any(1) & ~outcome.commit.any(1)
    is_idle &= running & ~is_nan
    state.fault += is_nan * NOT_NUMBERS + is_idle * NO_COMMIT
    state.paused |= state.fault > 0
    goes_on = (state.fault == 0).unsqueeze(1)
    return outcome._replace(commit=outcome.commit & goes_on, remask=outcome.remask & goes_on)


def _update(
    state: BurstState,
    slots: Tensor,
    blocks: ActiveBlocks,
    view: BlockView,
    main: Statistics,
    outcome: Outcome,
    mask_id: int,
) -> None:
    """Writes the decisions into the canvases and advances those whose block is finished."""
    running = ~state.paused
    if (are_light := state.are_light()) is not None:
        state.num_full_forwards += running & state.reuses & ~are_light
    state.num_forwards += running
    state.block_forwards += running
    state.num_query_rows += running * state.rows_of_forward(blocks)
    commit, remask, holds, _ = outcome
    if state.remask:
        state.num_remasked += remask.sum(1)
    takes_top = outcome.takes_top.unsqueeze(1)
    proposal = torch.where(takes_top, main.top_token.view(slots.shape), main.proposal.view(slots.shape))
    logprob = torch.where(
        takes_top, main.top_logprob.view(slots.shape), main.proposal_logprob.view(slots.shape)
    )
    log_confidence = torch.where(takes_top, view.log_top, view.log_confidence)
    if blocks.is_target is not None:
        proposal = torch.where(blocks.is_target, blocks.given, proposal)
        log_given = main.log_given.view(slots.shape)
        logprob, log_confidence = (
            torch.where(blocks.is_target, log_given, own) for own in (logprob, log_confidence)
        )
    confidence = prob(log_confidence).float()
    if len(state.events.canvases):
        top_token = main.top_token.view(slots.shape)
        _record(state, slots, blocks, view, outcome, proposal, confidence, top_token)
    tokens = torch.where(remask, mask_id, torch.where(commit, proposal, blocks.tokens))
    state.tokens[blocks.rows] = tokens
    when = state.num_forwards.unsqueeze(1).expand_as(slots)
    for table, committed_value in (
        (state.confidences, confidence),
        (state.logprobs, logprob),
        (state.commit_steps, when),
    ):
        value = torch.where(commit, committed_value, table.gather(1, slots))
        table.scatter_(1, slots, value.masked_fill(remask, 0))
    block_done = running & ~(blocks.valid & (tokens == mask_id)).any(1) & ~holds
    stopped = (blocks.valid & state.stops.find(tokens)).any(1)
    state.block += block_done
    state.block_forwards.masked_fill_(block_done, 0)
    state.finished |= block_done & (stopped | (state.block * state.block_len >= state.canvas_len))
    state.paused |= state.finished | (block_done & state.pauses)
    for group, memory in zip(state.remask, state.memory, strict=True):
        done = block_done[group.canvases]
        for field in group.memory_fields:
            held = memory[field.name]
            held.masked_fill_(done.view(-1, *[1] * (held.ndim - 1)), field.initial)
    if state.removed is not None:
        removed = _with_removed(state, state.removed, blocks, remask)
        state.removed = removed.masked_fill(block_done.view(-1, 1, 1), -1)


def _record(
    state: BurstState,
    slots: Tensor,
    blocks: ActiveBlocks,
    view: BlockView,
    outcome: Outcome,
    proposal: Tensor,
    confidence: Tensor,
    top_token: Tensor,
) -> None:
    """Records the events of traced canvases. The confidence of a remasking is the token's leave-one-out
    probability, or that at its own row, if the policy reads them; else the confidence at its commit."""
    doubt = torch.where(
        state.verifies.unsqueeze(1),
        prob(view.log_verified).float(),
        torch.where(
            state.reads_committed.unsqueeze(1),
            prob(view.log_visible).float(),
            state.confidences.gather(1, slots),
        ),
    )
    state.events.add(
        step=state.num_forwards,
        slots=slots,
        commit=outcome.commit,
        remask=outcome.remask,
        token=torch.where(outcome.remask, blocks.tokens, proposal),
        confidence=torch.where(outcome.remask, doubt, confidence),
        is_top=proposal == top_token,
    )


def _with_removed(state: BurstState, removed: Tensor, blocks: ActiveBlocks, remask: Tensor) -> Tensor:
    """The removed ids [R, B, K], with those of this step appended to the ids of their slot."""
    place = torch.arange(removed.shape[2], device=removed.device)
    is_next = place == (removed >= 0).sum(2, keepdim=True)
    is_new = is_next & (remask & state.bans_removed.unsqueeze(1)).unsqueeze(2)
    return torch.where(is_new, blocks.tokens.unsqueeze(2), removed)
