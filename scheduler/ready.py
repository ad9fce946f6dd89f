"""The queue of ready canvases."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence

from remask.scheduler.canvas import Canvas
from remask.scheduler.planning import Order


class ReadyQueue:
    """Heaps of canvases: those that any worker may run, and for each worker those whose keys it holds.
    Canvases of aborted requests are removed lazily."""

    def __init__(self) -> None:
        self._heaps: dict[int | None, list[tuple[Order, Canvas]]] = {None: []}
        self._num_aborted = 0

    def __len__(self) -> int:
        """Canvases that are not aborted."""
        return self.num_held - self._num_aborted

    @property
    def num_held(self) -> int:
        """Canvases that the heaps refer to, the aborted ones included."""
        return sum(map(len, self._heaps.values()))

    def push(self, canvas: Canvas) -> None:
        """Adds a canvas."""
        canvas.queued = True
        heapq.heappush(self._heaps.setdefault(canvas.home, []), (canvas.order, canvas))

    def note_aborted(self, num_canvases: int) -> None:
        """Records that `num_canvases` canvases in it were marked as aborted."""
        self._num_aborted += num_canvases
        if 2 * self._num_aborted > self.num_held:  # so that a removal costs a constant number of moves
            for heap in self._heaps.values():
                heap[:] = [entry for entry in heap if not entry[1].aborted]
                heapq.heapify(heap)
            self._num_aborted = 0

    def first(self, homes: Iterable[int | None]) -> Canvas | None:
        """The first canvas of some homes, which stays in the queue; None if there is none."""
        found = [entry for home in homes if (entry := self._first_of(home)) is not None]
        return min(found)[1] if found else None

    def pop(self, canvas: Canvas) -> None:
        """Removes the canvas that `first` has returned."""
        heapq.heappop(self._heaps[canvas.home])
        canvas.queued = False

    def candidates(self, homes: Sequence[int | None], running: Iterable[Canvas]) -> Iterator[Canvas]:
        """The canvases that may join a worker's next burst, in order: those of the queue with one of these
        homes, which leave it, and those of the worker's burst in flight."""
        going_on = iter(running)  # a burst is in the order of the queue
        first_running = next(going_on, None)
        while True:
            ready = self.first(homes)
            if ready is None and first_running is None:
                return
            if ready is None or (first_running is not None and first_running.order < ready.order):
                assert first_running is not None
                yield first_running
                first_running = next(going_on, None)
            else:
                self.pop(ready)
                yield ready

    def take_out(self, request_ids: Collection[str]) -> None:
        """Removes all canvases of some requests."""
        for heap in self._heaps.values():
            for _, canvas in heap:
                canvas.queued = canvas.queued and canvas.request_id not in request_ids
            heap[:] = [entry for entry in heap if entry[1].queued]
            heapq.heapify(heap)

    def homes(self) -> list[int]:
        """The workers that canvases wait for."""
        return [home for home, heap in self._heaps.items() if home is not None and heap]

    def release(self, home: int) -> None:
        """Lets any worker run the canvases of a worker that is gone."""
        for order, canvas in self._heaps.pop(home, []):
            canvas.home = None
            heapq.heappush(self._heaps[None], (order, canvas))

    def _first_of(self, home: int | None) -> tuple[Order, Canvas] | None:
        heap = self._heaps.get(home, [])
        while heap:
            if not heap[0][1].aborted:
                return heap[0]
            heapq.heappop(heap)
            self._num_aborted -= 1
        return None
