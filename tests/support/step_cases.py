"""Canvases for the tests of the denoising step, and steps of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    LowProb,
    OracleLoo,
    RandomRemask,
    Rcr,
    Remdm,
    Saber,
    SamplingParams,
    Schedule,
    Threshold,
    Wino,
)
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.burst.state import BurstState
from remask.workers.keyed_random import stream_keys
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows, StepInputs
from remask.workers.worker import Worker

PROMPT = [33, 11, 12, 14]
# Fields of canvases with every policy, on models with logits that are not shifted.
POLICIES: tuple[dict[str, Any], ...] = (
    {"unmask": Schedule()},
    {"unmask": Schedule(9, "random")},
    {"unmask": Schedule(12, "margin")},
    {"unmask": Threshold(0.6)},
    {"unmask": Factor(1.0)},
    {"unmask": CappedThreshold(0.5)},
    {"unmask": CappedThreshold(0.3), "remask": Wino(0.9)},
    {"unmask": Threshold(0.4), "remask": Wino(0.95, budget="cur_accept")},
    {"unmask": Schedule(6), "remask": Wino(0.9)},
    {"unmask": CappedThreshold(0.3), "remask": Wino(0.9, tile="self")},
    {"unmask": EntropyBound(1.0)},
    {"unmask": Bernoulli(2.0)},
    {"unmask": Threshold(0.3), "remask": LowProb(0.6, max_times=2, post_steps=3)},
    {"remask": Saber(3, 2)},
    {"unmask": CappedThreshold(0.3), "remask": RandomRemask(t2=0.95)},
    {"unmask": Threshold(0.3), "remask": RandomRemask("low_prob", t=0.6)},
    {"unmask": Dream(), "block_length": None},
    {"unmask": Dream(12, "origin"), "block_length": None},
    {"unmask": Dream(7, "maskgit_plus", alg_temp=0.3), "block_length": None, "top_p": 0.9},
    {"unmask": Schedule(9), "remask": Rcr()},
    {"unmask": Schedule(14), "remask": Rcr("margin"), "top_k": 5},
    {"remask": Remdm(10, "cap", 0.3)},
    {"remask": Remdm(schedule="conf")},
    {"unmask": CappedThreshold(0.3), "remask": OracleLoo(0.9)},
    {"unmask": CappedThreshold(0.2), "remask": Wino(0.95, ban_old=True)},
    {"unmask": Threshold(0.2), "remask": LowProb(0.7, max_times=3, ban_old=True)},
)


def canvas(params: SamplingParams, prompt: list[int] = PROMPT, seed: int = 5) -> Canvas:
    return new_canvas("r", 0, prompt, resolve(params), seed=seed, sample=0, mask_id=0, stop_ids=[])


def burst(canvases: list[Canvas], states: list[CanvasState], num_steps: int) -> StepBatch:
    return StepBatch(burst_id=0, num_steps=num_steps, specs=[c.spec for c in canvases], states=states)


def step_inputs(state: BurstState, mask_id: int, needs: frozenset[str] = frozenset()) -> StepInputs:
    """What a plan is given in the next step of a burst."""
    slots, valid = state.active_slots()
    return StepInputs(
        tokens=state.tokens,
        blocks=state.active_blocks(slots, valid, mask_id),
        mask_id=mask_id,
        sampling=state.sampling,
        keys=stream_keys(state.keys.unsqueeze(1), slots),
        needs=needs,
        removed=state.removed,
    )


def logits_of(model: TransformerDenoiser, tokens: NDArray[Any]) -> Tensor:
    """Logits of all rows of a prompt with its canvas, without packing."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    every, bounds = torch.arange(len(ids)), (0, len(ids))
    layout = VarlenLayout(bounds, bounds, ())
    rows = PackedRows(ids, every, layout, every, layout, every, len(ids))
    return model.model.logits(model.model(rows, model.attention, model.ops), model.ops)


def finish(model: TransformerDenoiser, canvases: list[Canvas], num_steps: int = 1000) -> list[CanvasState]:
    states = [c.state for c in canvases]
    for own in canvases:
        own.events.clear()
    while not all(state.finished for state in states):
        live = [i for i, state in enumerate(states) if not state.finished]
        result = Worker(model).run(burst([canvases[i] for i in live], [states[i] for i in live], num_steps))
        for place, (i, state) in enumerate(zip(live, result.states, strict=True)):
            states[i] = state
            canvases[i].events.append(result.events.get(place, b""))
    return states


def after(model: TransformerDenoiser, own: Canvas, num_steps: int) -> CanvasState:
    (state,) = Worker(model).run(burst([own], [own.state], num_steps)).states
    return state
