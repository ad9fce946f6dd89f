"""A worker: weights, and the canvases of its last burst in case the next one goes on with them.

What it keeps is a convenience: the scheduler has all canvases, and a burst that follows nothing runs on any
worker. A burst is *launched*, which on a GPU returns before it has run, and *collected*: the next one can be
on its way while the host reads the results of this one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from remask.scheduler.canvas import CanvasState
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.burst import BurstState, Results
from remask.workers.graphs import Shape, StepGraphs
from remask.workers.memory import is_out_of_memory
from remask.workers.models.denoiser import Denoiser
from remask.workers.staging import Fetched, to_device
from remask.workers.step import Plans, denoise, plan_packs

ROOM_STEPS = 16  # between two looks at how many tokens the slots have lost


class NotRun(NamedTuple):
    """A burst that did not run, and why; see `StepResult`."""

    burst_id: int
    failure: Literal["memory", "skipped"]
    seconds: float


class Unpacked(NamedTuple):
    """The canvases of a burst where the model is.

    Attributes:
        plans: empty where shapes are not fixed.
        shape: that of the memory which they stand in, where a graph can use it.
    """

    state: BurstState
    plans: Plans
    shape: Shape | None


@dataclass
class Launched:
    """A burst that runs, or has run.

    Attributes:
        burst_id: its number.
        started: monotonic seconds.
        num_rows: rows forwarded.
        num_canvases: how many of the state's canvases are the burst's; the others fill it up.
        state: the canvases.
        results: what it leaves behind.
        before: the burst before it, until somebody has waited for it.
        states: the canvases as the scheduler gets them, once somebody has waited for them.
    """

    burst_id: int
    started: float
    num_rows: int
    num_canvases: int
    state: BurstState
    results: Fetched[Results]
    before: Launched | None
    states: list[CanvasState] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> list[CanvasState]:
        """The canvases, when the burst is over; from any thread, also while the next burst is launched."""
        with self.lock:
            if self.before is not None:  # a trace goes on where the last one ended
                self.before.wait()
                self.before = None
            if self.states is None:
                self.states = self.state.to_states(self.results.wait())[: self.num_canvases]
            return self.states


class Worker:
    """Runs bursts on one model, one after another.

    Args:
        model: the weights.
        graphs: of its steps; None: every step is launched kernel by kernel.
    """

    def __init__(self, model: Denoiser, graphs: StepGraphs | None = None) -> None:
        self._model, self._graphs = model, graphs
        self._last: Launched | None = None
        self._tensors: Unpacked | None = None  # what it left where the model is
        self._failed: int | None = None  # the last burst, where it did not run

    def run(self, batch: StepBatch) -> StepResult:
        """Takes up to `batch.num_steps` denoising steps; a pure function of the canvases and the weights.

        A burst that was interrupted may be run again. One that does not fit the memory, or follows such a
        one, changes nothing and is answered as failed.
        """
        return self.collect(self.launch(batch))

    def launch(self, batch: StepBatch) -> Launched | NotRun:
        """Starts a burst. It may follow the one that was launched before it, collected or not."""
        if batch.follows is not None and batch.follows == self._failed:
            self._failed = batch.burst_id
            return NotRun(batch.burst_id, "skipped", 0.0)
        self._failed = None
        started = time.perf_counter()
        try:
            return self._launch(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only now does nothing hold the tensors of the failed step any more.
        self._last = self._tensors = None
        self._failed = batch.burst_id
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return NotRun(batch.burst_id, "memory", time.perf_counter() - started)

    def collect(self, launched: Launched | NotRun) -> StepResult:
        """Waits for a burst; from any thread, while others are launched from one."""
        if isinstance(launched, NotRun):
            burst_id, failure, seconds = launched
            return StepResult(burst_id=burst_id, states=[], num_rows=0, seconds=seconds, failure=failure)
        return StepResult(
            burst_id=launched.burst_id,
            states=launched.wait(),
            num_rows=launched.num_rows,
            seconds=time.perf_counter() - launched.started,
        )

    @torch.inference_mode()
    def _launch(self, batch: StepBatch) -> Launched:
        started = time.perf_counter()
        unpacked = self._unpack(batch)
        state, plans, shape = unpacked
        if shape is not None and self._graphs is not None:
            num_rows = self._graphs.run(shape, lambda: denoise(state, plans, self._model), batch.num_steps)
        elif self._model.fixed_shapes:
            num_rows = advance_blindly(state, plans, batch.num_steps, self._model)
        else:
            num_rows = advance(state, batch.num_steps, self._model)
        results = Fetched(state.results())
        launched = Launched(batch.burst_id, started, num_rows, len(batch.specs), state, results, self._last)
        if self._model.device.type == "cpu":
            launched.wait()  # the next burst writes into the same tensors
        self._last, self._tensors = launched, unpacked
        return launched

    def _unpack(self, batch: StepBatch) -> Unpacked:
        """The canvases of a burst where the model is, and where shapes are fixed the plans for them."""
        fixed = self._model.fixed_shapes
        # Taken out for as long as they are written to: an interrupted burst starts again from the bytes.
        tensors, self._tensors = self._tensors, None
        before: list[CanvasState] = []
        if batch.follows is not None:
            last = self._last
            assert last is not None, "there is no burst to follow"
            assert last.burst_id == batch.follows, f"burst {batch.follows} is not the last one here"
            # In fixed shapes, how many tokens slots have lost is read from the bytes.
            may_go_on = tensors is not None and not (fixed and tensors.state.removed is not None)
            if tensors is not None and may_go_on and batch.states == list(range(last.num_canvases)):
                tensors.state.resume()
                return tensors
            before = last.wait()
        states = [before[state] if isinstance(state, int) else state for state in batch.states]
        if self._graphs is not None and (placed := self._graphs.place(batch.specs, states)) is not None:
            return Unpacked(*placed)
        state = BurstState(batch.specs, states)
        if not fixed:
            return Unpacked(state, [], None)
        state.make_room(batch.num_steps)
        return Unpacked(*to_device((state, plan_packs(state, self._model)), self._model.device), None)


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
