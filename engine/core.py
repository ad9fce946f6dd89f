"""The loop: schedule a burst, run it, apply its result. Knows neither text nor tensors."""

from __future__ import annotations

import time
from collections.abc import Iterable

from remask.scheduler.errors import EngineDead
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler
from remask.workers.executor import Executor


class EngineCore:
    """A scheduler and an executor. Requests may be added at any time between steps."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._num_in_flight = [0] * executor.num_workers  # bursts whose result was not taken yet
        self._dead: str | None = None

    def add(self, request: Request) -> None:
        """Takes a validated request.

        Raises:
            EngineDead: the engine was closed or has failed.
        """
        if self._dead is not None:
            raise EngineDead(self._dead)
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests that nobody waits for any more."""
        self._scheduler.abort(request_ids)

    def step(self) -> list[Request]:
        """Fills the workers' queues and waits for one result; returns the requests that it finished (none
        where nothing was ready).

        An interrupt drops the bursts in flight: their canvases are ready again as they were before.
        """
        try:
            self._fill()
            return self._finish_one() if any(self._num_in_flight) else []
        except KeyboardInterrupt:
            self._executor.forget()
            for worker in range(self._executor.num_workers):
                self._scheduler.lose(worker)
                self._num_in_flight[worker] = 0
            raise
        except BaseException as error:
            self.close(f"a burst failed: {error!r}; make a new LLM")
            raise

    def _fill(self) -> None:
        for worker, num_held in enumerate(self._num_in_flight):
            for _ in range(num_held, self._executor.queue_depth):
                batch = self._scheduler.next_batch(worker)
                if batch is None:
                    break
                self._executor.submit(batch, worker)
                self._num_in_flight[worker] += 1

    def _finish_one(self) -> list[Request]:
        worker, result = self._executor.next_result()
        self._num_in_flight[worker] -= 1
        finished = self._scheduler.update(result)
        now = time.monotonic()
        for request in finished:
            request.finish_time = now
        return finished

    def close(self, reason: str = "the engine was closed; make a new LLM") -> None:
        """Frees the workers; idempotent."""
        if self._dead is None:
            self._dead = reason
            self._executor.close()
