"""Canvases for the tests of the denoising step, and steps of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remask import (
    SamplingParams,
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
