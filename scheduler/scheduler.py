"""Who goes next: first come, first served, under a budget of rows and sequences.

The scheduler owns every canvas; a worker only borrows them for a burst. Ready canvases are taken in the order
of their arrival until one does not fit, so those that run keep their place until they finish and nobody is
overtaken.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

from remask.scheduler.canvas import Canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.request import Request

IDLE_BURST = (
    8  # steps a burst when nobody waits: long enough to hide the host, short enough to let newcomers in
)


def fits(num_rows: int, num_seqs: int, canvas_rows: int, max_num_rows: int, max_num_seqs: int) -> bool:
    """Whether a canvas may join a batch; one larger than the whole budget runs alone."""
    return num_seqs == 0 or (num_seqs < max_num_seqs and num_rows + canvas_rows <= max_num_rows)


class Scheduler:
    """Holds the live requests and cuts bursts from them."""

    def __init__(self, *, max_num_rows: int, max_num_seqs: int, burst: int | None) -> None:
        self._max_num_rows, self._max_num_seqs, self._burst = max_num_rows, max_num_seqs, burst
        self._requests: dict[str, Request] = {}
        self._ready: list[tuple[int, Canvas]] = []  # heap by ordinal
        self._running: dict[int, list[Canvas]] = {}  # burst id -> its canvases
        self._burst_ids = itertools.count()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Takes a request; its canvases may join the next burst."""
        self._requests[request.request_id] = request
        for canvas in request.canvases:
            heapq.heappush(self._ready, (canvas.ordinal, canvas))

    def discard(self, request_ids: Iterable[str]) -> None:
        """Forgets requests; what their canvases do in a running burst is dropped when it ends."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
        self._ready = [entry for entry in self._ready if entry[1].request_id in self._requests]
        heapq.heapify(self._ready)

    def next_batch(self) -> StepBatch | None:
        """The next burst, or None when no canvas is ready."""
        taken: list[Canvas] = []
        num_rows = 0
        while self._ready and fits(
            num_rows, len(taken), self._ready[0][1].num_rows, self._max_num_rows, self._max_num_seqs
        ):
            _, canvas = heapq.heappop(self._ready)
            taken.append(canvas)
            num_rows += canvas.num_rows
        if not taken:
            return None
        burst_id = next(self._burst_ids)
        self._running[burst_id] = taken
        return StepBatch(
            burst_id=burst_id,
            num_steps=self._burst if self._burst is not None else (1 if self._ready else IDLE_BURST),
            specs=[canvas.spec for canvas in taken],
            states=[canvas.state for canvas in taken],
        )

    def update(self, result: StepResult) -> list[Request]:
        """Applies a burst's result; returns the requests that it finished."""
        finished: list[Request] = []
        for canvas, state in zip(self._running.pop(result.burst_id), result.states, strict=True):
            request = self._requests.get(canvas.request_id)
            if request is None:  # discarded while the burst ran
                continue
            canvas.state = state
            if not state.finished:
                heapq.heappush(self._ready, (canvas.ordinal, canvas))
            elif request.finished:
                finished.append(self._requests.pop(request.request_id))
        return finished
