"""The executor that runs bursts in the engine's process."""

from __future__ import annotations

from collections import deque

from remask.scheduler.errors import EngineDead, InvalidRequest
from remask.scheduler.messages import StepBatch
from remask.workers.executors.base import Event, Executor, Finished
from remask.workers.models.update import Weights
from remask.workers.startup.host_memory import available_bytes, check_room
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import measure_knee, row_budget, start_worker
from remask.workers.worker import Launched, NotRun, Worker


class InProcessExecutor(Executor):
    """One worker in the caller's process; never starts Ray.

    `next_event` runs a burst. On a GPU it also launches the next one, before the host waits for the first.
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

    def stage_weights(self, weights: Weights) -> None:
        if self._worker is None:
            raise EngineDead("the engine was closed; make a new one")
        if self.facts.weight_bytes is not None:
            check_room(self.facts.weight_bytes, available_bytes(), weights)
        self._worker.stage(weights)

    def swap_weights(self) -> None:
        assert self._worker is not None, "the executor is closed"
        self._worker.swap()

    def close(self) -> None:
        self._worker = None
        self._queue.clear()
        self._launched.clear()
