"""The live requests, their canvases, and which burst each canvas is in.

The scheduler owns every canvas; a worker only borrows it for a burst. A canvas is *ready* (it waits in the
queue), *in flight* (it is in a burst, and perhaps in others that continue it), or *ended*. Between bursts
nobody holds a place: each burst takes the first of the queue, so those that run keep running and an urgent
newcomer displaces the last of them at the cost of nothing but their turn.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remask.scheduler.canvas import Canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.planning import Budget, Order, burst_len, order_of, take
from remask.scheduler.request import Request


@dataclass
class _Burst:
    """A burst that has not come back; the worker runs its bursts one after another."""

    worker: int
    canvases: list[Canvas]


class Scheduler:
    """Cuts bursts from a queue of canvases and applies their results.

    Args:
        max_num_rows: rows of a forward; a canvas that is larger runs alone.
        max_num_seqs: canvases of a burst.
        burst: denoising steps of a burst; None: see `planning.burst_len`.
    """

    def __init__(self, *, max_num_rows: int, max_num_seqs: int, burst: int | None) -> None:
        self._budget, self._burst_len = Budget(max_num_rows, max_num_seqs), burst
        self._requests: dict[str, Request] = {}
        self._queue: list[tuple[Order, Canvas]] = []  # heap; may hold canvases of aborted requests
        self._num_stale = 0  # of them, those of aborted requests
        self._bursts: dict[int, _Burst] = {}  # in the order in which they were cut
        self._tails: dict[int, int] = {}  # worker -> its last burst, while that is in flight
        self._burst_ids = itertools.count()
        self._num_quiet = 0  # bursts since the last arrival

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_held(self) -> int:
        """Canvases that the queue and the bursts in flight refer to, those of aborted requests included."""
        return len(self._queue) + sum(len(burst.canvases) for burst in self._bursts.values())

    def add(self, request: Request) -> None:
        """Takes a request; its canvases may join the next burst."""
        self._requests[request.request_id] = request
        self._num_quiet = 0
        for canvas in request.canvases:
            canvas.order = order_of(request.priority, request.arrival_time, canvas.ordinal)
            heapq.heappush(self._queue, (canvas.order, canvas))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests in whatever state; what a burst in flight still does to them is dropped.

        Ids that are not live are passed over: a request may end just before it is aborted.
        """
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            for canvas in request.canvases if request is not None else ():
                canvas.aborted = True
                self._num_stale += canvas.last_burst is None and not canvas.state.finished
        if 2 * self._num_stale > len(self._queue):  # so that a removal costs a constant number of moves
            self._queue = [entry for entry in self._queue if not entry[1].aborted]
            heapq.heapify(self._queue)
            self._num_stale = 0

    def next_batch(self, worker: int = 0) -> StepBatch | None:
        """The next burst for a worker, or None when there is nothing for it.

        While a burst of the worker is in flight, the new one may *continue* its canvases: it names their
        places there, and the worker goes on with what that burst leaves behind.
        """
        follows = self._tails.get(worker)
        before = self._bursts[follows].canvases if follows is not None else []
        taken, passed = take(self._candidates(before), self._budget)
        for canvas in passed:
            if canvas.last_burst is None:
                heapq.heappush(self._queue, (canvas.order, canvas))
        if not taken:
            return None
        places = {id(canvas): place for place, canvas in enumerate(before)}
        continued = sum(id(canvas) in places for canvas in taken)
        others_wait = self._first_ready() is not None or continued < sum(map(_goes_on, before))
        burst_id = self._tails[worker] = next(self._burst_ids)
        self._bursts[burst_id] = _Burst(worker, taken)
        for canvas in taken:
            canvas.last_burst = burst_id
        batch = StepBatch(
            burst_id=burst_id,
            num_steps=burst_len(self._burst_len, others_wait=others_wait, num_quiet=self._num_quiet),
            follows=follows if continued else None,
            specs=[canvas.spec for canvas in taken],
            states=[places.get(id(canvas), canvas.state) for canvas in taken],
        )
        self._num_quiet += 1
        return batch

    def update(self, result: StepResult) -> list[Request]:
        """Applies a burst's result; returns the requests that it finished.

        Results of one worker come in the order of its bursts.
        """
        burst = self._bursts.pop(result.burst_id)
        if self._tails[burst.worker] == result.burst_id:
            del self._tails[burst.worker]
        finished: list[Request] = []
        for canvas, state in zip(burst.canvases, result.states, strict=True):
            in_next = canvas.last_burst != result.burst_id
            if not in_next:
                canvas.last_burst = None
            if not _goes_on(canvas):  # aborted, or ended by the burst before
                continue
            request = self._requests[canvas.request_id]
            canvas.state = request.settle(canvas, state)
            if canvas.state.finished:
                request.num_open -= 1
                if request.num_open == 0:
                    finished.append(self._requests.pop(request.request_id))
            elif not in_next:
                heapq.heappush(self._queue, (canvas.order, canvas))
        return finished

    def lose(self, worker: int) -> None:
        """Takes back what a worker had: its canvases are ready again as they were before."""
        for burst_id in [burst_id for burst_id, burst in self._bursts.items() if burst.worker == worker]:
            for canvas in self._bursts.pop(burst_id).canvases:
                if canvas.last_burst is not None and _goes_on(canvas):
                    heapq.heappush(self._queue, (canvas.order, canvas))
                canvas.last_burst = None
        self._tails.pop(worker, None)

    def _first_ready(self) -> Canvas | None:
        """The first of the queue that is live; those of aborted requests before it are dropped."""
        while self._queue:
            canvas = self._queue[0][1]
            if not canvas.aborted:
                return canvas
            heapq.heappop(self._queue)
            self._num_stale -= 1
        return None

    def _candidates(self, before: list[Canvas]) -> Iterator[Canvas]:
        """Who may join a worker's next burst, in order: the queue, whose canvases leave it, and those of its
        burst in flight."""
        running = filter(_goes_on, before)  # a burst is in the order of the queue
        first_running = next(running, None)
        while True:
            ready = self._first_ready()
            if ready is None and first_running is None:
                return
            if ready is None or (first_running is not None and first_running.order < ready.order):
                assert first_running is not None
                yield first_running
                first_running = next(running, None)
            else:
                yield heapq.heappop(self._queue)[1]


def _goes_on(canvas: Canvas) -> bool:
    return not (canvas.aborted or canvas.state.finished)
