"""Executors: how bursts get to workers and results come back. This one runs them in the caller's process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.models.denoiser import Denoiser
from remask.workers.worker import Worker


class Executor(ABC):
    """Runs bursts somewhere. Results of one worker come in the order of its bursts.

    Attributes:
        num_workers: workers, numbered from 0.
        queue_depth: bursts that a worker holds, the running one included; more than one, so that it need not
            wait for the host.
    """

    num_workers: int = 1
    queue_depth: int = 1

    @abstractmethod
    def submit(self, batch: StepBatch, worker: int) -> None:
        """Hands a burst to a worker."""

    @abstractmethod
    def next_result(self) -> tuple[int, StepResult]:
        """Waits for the next result of a submitted burst; with the worker it came from."""

    @abstractmethod
    def forget(self) -> None:
        """Drops the bursts that have not come back; their results are never returned."""

    @abstractmethod
    def close(self) -> None:
        """Frees the workers; idempotent."""


class InProcessExecutor(Executor):
    """One worker in the caller's process and thread, which runs a burst when its result is asked for; never
    starts Ray."""

    def __init__(self, model: Denoiser) -> None:
        self._worker: Worker | None = Worker(model)
        self._queue: deque[StepBatch] = deque()

    def submit(self, batch: StepBatch, worker: int) -> None:
        self._queue.append(batch)

    def next_result(self) -> tuple[int, StepResult]:
        assert self._worker is not None, "the executor is closed"
        return 0, self._worker.run(self._queue.popleft())

    def forget(self) -> None:
        self._queue.clear()

    def close(self) -> None:
        self._worker = None
        self._queue.clear()
