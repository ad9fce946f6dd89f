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
from remask.workers.memory import is_out_of_memory
from remask.workers.models.denoiser import Denoiser
from remask.workers.staging import to_device
from remask.workers.step import Plans, denoise, plan_packs

ROOM_STEPS = 16  # between two looks at how many tokens the slots have lost


class Worker:
    """Runs bursts on one model, one after another."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self._last: tuple[int, list[CanvasState]] | None = None  # the last burst and how it left its canvases
        self._tensors: tuple[BurstState, Plans] | None = None  # the same canvases on the device
        self._failed: int | None = None  # the last burst, where it did not run

    def run(self, batch: StepBatch) -> StepResult:
        """Takes up to `batch.num_steps` denoising steps; a pure function of the canvases and the weights.

        A burst that was interrupted may be run again. One that does not fit the memory, or follows such a
        one, changes nothing and is answered as failed.
        """
        if batch.follows is not None and batch.follows == self._failed:
            self._failed = batch.burst_id
            return StepResult(burst_id=batch.burst_id, states=[], num_rows=0, seconds=0.0, failure="skipped")
        self._failed = None
        started = time.perf_counter()
        try:
            return self._run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only now does nothing hold the tensors of the failed step any more.
        self._last = self._tensors = None
        self._failed = batch.burst_id
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = time.perf_counter() - started
        return StepResult(burst_id=batch.burst_id, states=[], num_rows=0, seconds=seconds, failure="memory")

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> StepResult:
        started = time.perf_counter()
        state, plans = self._unpack(batch)
        if self._model.fixed_shapes:
            num_rows = advance_blindly(state, plans, batch.num_steps, self._model)
        else:
            num_rows = advance(state, batch.num_steps, self._model)
        states = state.to_states()
        self._last, self._tensors = (batch.burst_id, states), (state, plans)
        return StepResult(
            burst_id=batch.burst_id, states=states, num_rows=num_rows, seconds=time.perf_counter() - started
        )

    def _unpack(self, batch: StepBatch) -> tuple[BurstState, Plans]:
        """The canvases of a burst on the device, and where shapes are fixed the plans for them."""
        fixed = self._model.fixed_shapes
        # Taken out for as long as they are written to: an interrupted burst starts again from the bytes.
        tensors, self._tensors = self._tensors, None
        if batch.follows is None:
            before: list[CanvasState] = []
        else:
            assert self._last is not None, "there is no burst to follow"
            last_id, before = self._last
            assert last_id == batch.follows, f"burst {batch.follows} is not the last one here"
            # In fixed shapes, how many tokens slots have lost is read from the bytes.
            may_go_on = tensors is not None and not (fixed and tensors[0].removed is not None)
            if tensors is not None and may_go_on and batch.states == list(range(len(before))):
                tensors[0].resume()
                return tensors
        states = [before[state] if isinstance(state, int) else state for state in batch.states]
        state = BurstState(batch.specs, states)
        if not fixed:
            return state, []
        state.make_room(batch.num_steps)
        return to_device((state, plan_packs(state, self._model)), self._model.device)


def advance_blindly(state: BurstState, plans: Plans, num_steps: int, model: Denoiser) -> int:
    """Takes `num_steps` denoising steps in place without ever waiting for the device; returns the rows
    forwarded. Canvases that pause on the way are computed to the end and not changed."""
    return sum(denoise(state, plans, model) for _ in range(num_steps))


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
