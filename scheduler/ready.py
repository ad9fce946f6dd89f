"""The queue of ready canvases."""

from __future__ import annotations

import heapq

from remask.scheduler.canvas import Canvas
from remask.scheduler.planning import Order


class ReadyQueue:
    """A heap of canvases. Those of aborted requests are removed lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[Order, Canvas]] = []
        self._num_aborted = 0

    def __len__(self) -> int:
        """Canvases that are not aborted."""
        return len(self._heap) - self._num_aborted

    @property
    def num_held(self) -> int:
        """Canvases that the heap refers to, the aborted ones included."""
        return len(self._heap)

    def push(self, canvas: Canvas) -> None:
        """Adds a canvas."""
        canvas.queued = True
        heapq.heappush(self._heap, (canvas.order, canvas))

    def note_aborted(self, num_canvases: int) -> None:
        """Records that `num_canvases` canvases in it were marked as aborted."""
        self._num_aborted += num_canvases
        if 2 * self._num_aborted > len(self._heap):  # so that a removal costs a constant number of moves
            self._heap = [entry for entry in self._heap if not entry[1].aborted]
            heapq.heapify(self._heap)
            self._num_aborted = 0

    def first(self) -> Canvas | None:
        """The first canvas, which stays in the queue; None if there is none."""
        while self._heap:
            canvas = self._heap[0][1]
            if not canvas.aborted:
                return canvas
            heapq.heappop(self._heap)
            self._num_aborted -= 1
        return None

    def pop(self) -> Canvas:
        """Removes and returns the canvas that `first` has returned."""
        canvas = heapq.heappop(self._heap)[1]
        canvas.queued = False
        return canvas
