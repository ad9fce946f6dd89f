"""Executors: how bursts get to a worker and results come back. This one runs them in the caller's process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque

import torch

from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.burst import BurstState
from remask.workers.models.denoiser import Denoiser
from remask.workers.step import denoise, plan_packs


@torch.inference_mode()
def run_burst(batch: StepBatch, model: Denoiser) -> StepResult:
    """Takes up to `batch.num_steps` denoising steps; a pure function of the batch and the weights."""
    started = time.perf_counter()
    state = BurstState(batch.specs, batch.states, model.device)
    num_rows = num_finished = 0
    plans = plan_packs(state, model)
    for _ in range(batch.num_steps):
        num_rows += denoise(state, plans, model)
        now_finished = int(state.finished.sum())
        if now_finished == len(batch.specs):
            break
        if now_finished > num_finished:  # finished canvases give up their rows
            plans, num_finished = plan_packs(state, model), now_finished
    return StepResult(
        burst_id=batch.burst_id,
        states=state.to_states(),
        num_rows=num_rows,
        seconds=time.perf_counter() - started,
    )


class Executor(ABC):
    """Runs bursts somewhere. Results may come back in another order than the bursts were submitted in."""

    @abstractmethod
    def submit(self, batch: StepBatch) -> None:
        """Hands a burst over."""

    @abstractmethod
    def next_result(self) -> StepResult:
        """Waits for the next result of a submitted burst."""

    @abstractmethod
    def close(self) -> None:
        """Frees the workers; idempotent."""


class InProcessExecutor(Executor):
    """One worker in the caller's process and thread; never starts Ray."""

    def __init__(self, model: Denoiser) -> None:
        self._model: Denoiser | None = model
        self._queue: deque[StepBatch] = deque()

    def submit(self, batch: StepBatch) -> None:
        self._queue.append(batch)

    def next_result(self) -> StepResult:
        assert self._model is not None, "the executor is closed"
        result = run_burst(self._queue[0], self._model)
        self._queue.popleft()  # only now: an interrupted burst is run again
        return result

    def close(self) -> None:
        self._model = None
        self._queue.clear()
