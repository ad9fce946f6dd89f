"""Which canvases' keys and values a worker keeps between bursts.

Kept rows are a cache: they are a function of what identifies them, and a worker that does not hold them makes
them again. Canvases of a burst have rows of their own. Rows that a burst leaves wait for the next burst with
their canvas, and make room for others, those first that have waited longest.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

IDLE_BURSTS = 64  # that rows wait

Span = tuple[int, int]


class KeysDoNotFit(MemoryError):
    """The canvases of a burst keep more rows than the worker has."""


class Wanted(NamedTuple):
    """The rows that a canvas wants.

    Attributes:
        content: what its keys are a function of; None: it makes new ones.
        num_rows: their number.
    """

    content: Hashable | None
    num_rows: int


class Given(NamedTuple):
    """The rows that a canvas gets, and whether they hold what it wants."""

    span: Span
    are_held: bool


class _Waiting(NamedTuple):
    span: Span
    burst: int  # the number of the burst that left it


class KeyStore:
    """The kept rows of a worker.

    Args:
        first: number of the first row.
        num_rows: how many there are.
    """

    def __init__(self, first: int, num_rows: int) -> None:
        self._bounds = first, first + num_rows
        self._num_bursts = 0
        self.clear()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits in it and no burst uses it."""
        return not (self._waiting or self._used)

    def clear(self) -> None:
        """Forgets everything."""
        self._free: list[Span] = [self._bounds]  # in order; no two touch
        self._used: list[Span] = []
        self._waiting: dict[Hashable, list[_Waiting]] = {}  # the longest first

    def begin(self, wanted: Sequence[Wanted]) -> list[Given]:
        """Rows for the canvases of a burst; those of a burst that has not ended are free.

        Raises:
            KeysDoNotFit: there are not enough.
        """
        self._num_bursts += 1
        for span in self._used:
            self._release(span)
        self._used = []
        given = self._give(wanted)
        if given is None:  # what waits, or where it does, leaves no room
            self.clear()
            given = self._give(wanted)
        if given is None:
            self.clear()
            first, end = self._bounds
            total = sum(own.num_rows for own in wanted)
            raise KeysDoNotFit(f"{total} rows of keys, where there is room for {end - first}")
        return given

    def end(self, left: Iterable[tuple[Hashable, Span]]) -> None:
        """Ends a burst; `left` are the rows that its canvases go on with, and what they are a function of."""
        for content, span in left:
            self._used.remove(span)
            self._waiting.setdefault(content, []).append(_Waiting(span, self._num_bursts))
        for span in self._used:
            self._release(span)
        self._used = []
        for content, own in list(self._waiting.items()):
            if own[-1].burst >= self._num_bursts - IDLE_BURSTS:
                break
            self._forget(content)

    def _give(self, wanted: Sequence[Wanted]) -> list[Given] | None:
        """Rows for all canvases, those that are held first; None if there are not enough in one piece."""
        held = [self._take(own.content) for own in wanted]
        given: list[Given] = []
        for own, span in zip(wanted, held, strict=True):
            are_held = span is not None
            while span is None:
                span = self._cut(own.num_rows)
                if span is None and not self._waiting:
                    return None
                if span is None:
                    self._forget(next(iter(self._waiting)))
            if not are_held:
                self._used.append(span)
            given.append(Given(span, are_held))
        return given

    def _take(self, content: Hashable | None) -> Span | None:
        waiting = self._waiting.get(content) if content is not None else None
        if not waiting:
            return None
        span = waiting.pop().span
        if not waiting:
            del self._waiting[content]
        self._used.append(span)
        return span

    def _cut(self, num_rows: int) -> Span | None:
        """The first free rows of this number, which are free no more."""
        for i, (first, end) in enumerate(self._free):
            if end - first >= num_rows:
                self._free[i : i + 1] = [(first + num_rows, end)] if end - first > num_rows else []
                return first, first + num_rows
        return None

    def _forget(self, content: Hashable) -> None:
        for own in self._waiting.pop(content):
            self._release(own.span)

    def _release(self, span: Span) -> None:
        """Adds rows to the free ones."""
        insort(self._free, span)
        i = self._free.index(span)
        if i + 1 < len(self._free) and self._free[i + 1][0] == span[1]:
            self._free[i : i + 2] = [(span[0], self._free[i + 1][1])]
        if i > 0 and self._free[i - 1][1] == self._free[i][0]:
            self._free[i - 1 : i + 1] = [(self._free[i - 1][0], self._free[i][1])]
