"""Executors: how bursts get to workers and results come back. This one runs them in the caller's process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import WorkerFacts, measure_knee, row_budget, start_worker
from remask.workers.worker import Launched, NotRun, Worker


class Finished(NamedTuple):
    """A burst has come back."""

    worker: int
    result: StepResult


class Joined(NamedTuple):
    """A worker is there, and has shown that it works."""

    worker: int


class Left(NamedTuple):
    """A worker is gone, with the bursts that it had."""

    worker: int
    died: bool  # of itself; else it was asked to go


Event: TypeAlias = Finished | Joined | Left


class Executor(ABC):
    """Runs bursts somewhere. Results of one worker come in the order of its bursts.

    Attributes:
        facts: what the workers tell of the model.
        max_num_rows: rows of a batch: as given, or the knee, as far as their memory has room for them.
        workers: who takes bursts; a worker that comes back has a new number.
        queue_depth: bursts that a worker holds, the running one included; more than one, so that it need not
            wait for the host.
    """

    facts: WorkerFacts
    max_num_rows: int
    workers: Sequence[int] = (0,)
    queue_depth: int = 1

    @abstractmethod
    def submit(self, batch: StepBatch, worker: int) -> None:
        """Hands a burst to a worker."""

    @abstractmethod
    def next_event(self, timeout: float | None = None) -> Event | None:
        """Waits until something happens, and looks after the workers.

        Args:
            timeout: seconds; None: no limit. A worker in the caller's process ends its burst first.

        Returns:
            None if nothing has happened by then.

        Raises:
            EngineDead: the workers are out of reach for good.
            Unavailable: there is no worker, and none is coming.
        """

    @abstractmethod
    def scale(self, num_workers: int) -> None:
        """Wants another number of workers; from any thread. It takes effect in `next_event`."""

    @abstractmethod
    def close(self) -> None:
        """Frees the workers; idempotent."""


class InProcessExecutor(Executor):
    """One worker in the caller's process; never starts Ray.

    A burst runs when a result is asked for. On a GPU the next one is then launched too, before the host waits
    for the first.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._worker: Worker | None
        self._worker, self.facts = start_worker(setup)
        num_rows = setup.max_num_rows
        if num_rows is None:
            num_rows = measure_knee(self._worker, setup)
        self.max_num_rows = row_budget(num_rows, [self.facts.row_limit])
        self.queue_depth = 2 if self.facts.overlaps else 1
        self._queue: deque[StepBatch] = deque()
        self._launched: deque[Launched | NotRun] = deque()

    def submit(self, batch: StepBatch, worker: int) -> None:
        self._queue.append(batch)

    def next_event(self, timeout: float | None = None) -> Event | None:
        assert self._worker is not None, "the executor is closed"
        if not (self._queue or self._launched):
            return None
        while self._queue and len(self._launched) < self.queue_depth:
            self._launched.append(self._worker.launch(self._queue.popleft()))
        return Finished(0, self._worker.collect(self._launched.popleft()))

    def scale(self, num_workers: int) -> None:
        fix = "there is one worker, in this process; set distributed_executor_backend='ray'"
        raise InvalidRequest("num_workers", num_workers, fix)

    def close(self) -> None:
        self._worker = None
        self._queue.clear()
        self._launched.clear()
