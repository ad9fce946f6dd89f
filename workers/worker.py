"""A worker: weights, and the canvases of its last burst in case the next one goes on with them.

What it keeps is a convenience: the scheduler has all canvases, and a burst that follows nothing runs on any
worker.
"""

from __future__ import annotations

import time

import torch

from remask.scheduler.canvas import CanvasState
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.burst import BurstState
from remask.workers.models.denoiser import Denoiser
from remask.workers.step import denoise, plan_packs

ROOM_STEPS = 16  # between two looks at how many tokens the slots have lost


class Worker:
    """Runs bursts on one model, one after another."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self._last: tuple[int, list[CanvasState]] | None = None  # the last burst and how it left its canvases
        self._tensors: BurstState | None = None  # the same canvases on the device

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult:
        """Takes up to `batch.num_steps` denoising steps; a pure function of the canvases and the weights.

        A burst that was interrupted may be run again.
        """
        started = time.perf_counter()
        state = self._unpack(batch)
        state.resume()
        num_rows = advance(state, batch.num_steps, self._model)
        states = state.to_states()
        self._last, self._tensors = (batch.burst_id, states), state
        return StepResult(
            burst_id=batch.burst_id, states=states, num_rows=num_rows, seconds=time.perf_counter() - started
        )

    def _unpack(self, batch: StepBatch) -> BurstState:
        # Taken out for as long as they are written to: an interrupted burst starts again from the bytes.
        tensors, self._tensors = self._tensors, None
        if batch.follows is None:
            before: list[CanvasState] = []
        else:
            assert self._last is not None, "there is no burst to follow"
            last_id, before = self._last
            assert last_id == batch.follows, f"burst {batch.follows} is not the last one here"
            if tensors is not None and batch.states == list(range(len(before))):
                return tensors
        states = [before[state] if isinstance(state, int) else state for state in batch.states]
        return BurstState(batch.specs, states, self._model.device)


def advance(state: BurstState, num_steps: int, model: Denoiser) -> int:
    """Takes up to `num_steps` denoising steps in place; returns the rows forwarded.

    It ends early where a canvas pauses for a look at its text, so that this one does not wait for the others.
    """
    num_rows, num_paused = 0, int(state.paused.sum())
    plans = plan_packs(state, model)
    for step in range(num_steps):
        if not plans:
            break
        if step % ROOM_STEPS == 0:
            state.make_room(ROOM_STEPS)
        num_rows += denoise(state, plans, model)
        if bool((state.paused & ~state.finished).any()):
            break
        now_paused = int(state.paused.sum())
        if now_paused > num_paused:  # those that paused give up their rows
            plans, num_paused = plan_packs(state, model), now_paused
    return num_rows
