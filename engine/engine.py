"""The loop: schedule a burst, run it, apply its result. Knows neither text nor tensors."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from remask.scheduler.errors import EngineDead, RemaskError
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler
from remask.workers.executor import Event, Executor, Finished, Joined

LISTEN_SECONDS = 0.02  # a step of workers elsewhere ends by then, to let newcomers go to idle ones


class EngineCore:
    """A scheduler and an executor. Requests may be added at any time between steps."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._num_in_flight: Counter[int] = Counter()  # bursts of each worker whose result was not taken yet
        self._dead: RemaskError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a step has something to wait for."""
        return self._scheduler.num_live > 0 or self._num_in_flight.total() > 0

    def add(self, request: Request) -> None:
        """Takes a validated request.

        Raises:
            EngineDead: the engine was closed or has failed.
            Unavailable: it has no workers any more.
        """
        if self._dead is not None:
            raise self._dead
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests that nobody waits for any more."""
        self._scheduler.abort(request_ids)

    def step(self) -> list[Request]:
        """Fills the workers' queues and waits until something happens, or for a moment; returns the requests
        that ended by it. If there is nothing to do, it looks after the workers and does not wait.

        Raises:
            EngineDead: every burst fails, or the executor has failed.
            Unavailable: there is no worker, and none is coming.
        """
        try:
            self._fill()
            ended = self._scheduler.take_convicted()
            if not ended:
                event = self._executor.next_event(LISTEN_SECONDS if self.is_busy else 0.0)
                ended = [] if event is None else self._apply(event)
        except RemaskError as error:
            self._die(error)
            raise
        except BaseException as error:
            self._die(EngineDead(f"a burst failed: {error!r}; make a new LLM"))
            raise
        now = time.monotonic()
        for request in ended:
            request.finish_time = now
        return ended

    def _fill(self) -> None:
        """Gives every worker one burst before any gets another."""
        for depth in range(self._executor.queue_depth):
            wanting = [worker for worker in self._executor.workers if self._num_in_flight[worker] == depth]
            for worker in wanting:
                num_idle = sum(not self._num_in_flight[other] for other in self._executor.workers)
                batch = self._scheduler.next_batch(worker, num_idle=num_idle - (depth == 0))
                if batch is not None:
                    self._num_in_flight[worker] += 1
                    self._executor.submit(batch, worker)

    def _apply(self, event: Event) -> list[Request]:
        """Tells the scheduler; returns the requests that have ended by it."""
        if isinstance(event, Joined):
            return []
        if isinstance(event, Finished):
            self._num_in_flight[event.worker] -= 1
            return self._scheduler.update(event.result)
        del self._num_in_flight[event.worker]
        return self._scheduler.lose(event.worker, died=event.died)

    def close(self) -> None:
        """Frees the workers; idempotent."""
        self._die(EngineDead("the engine was closed; make a new LLM"))

    def _die(self, error: RemaskError) -> None:
        if self._dead is None:
            self._dead = error
            self._executor.close()
