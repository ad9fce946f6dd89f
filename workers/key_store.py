"""Which canvases' keys and values a worker keeps between bursts.

Kept rows are a cache: they are a function of what identifies them, and a worker that does not hold them makes
them again. Canvases of a burst have rows of their own. Rows that a burst leaves wait for the next burst with
their canvas, and make room for others, those first that have waited longest.
"""

from __future__ import annotations

import threading
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
    since: int  # the number of bursts before


class KeyStore:
    """The kept rows of a worker; from any thread.

    Args:
        first: number of the first row.
        num_rows: how many there are.
    """

    def __init__(self, first: int, num_rows: int) -> None:
        self._bounds, self._lock, self._num_bursts = (first, first + num_rows), threading.Lock(), 0
        self._free: list[Span] = [self._bounds]  # in order; no two touch
        self._used: dict[int, list[Span]] = {}  # by burst
        self._waiting: dict[Hashable, list[_Waiting]] = {}  # the longest first

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits in it and no burst uses it."""
        return not (self._waiting or self._used)

    def clear(self) -> None:
        """Forgets everything, also what bursts use."""
        with self._lock:
            self._clear()

    def begin(self, burst: int, wanted: Sequence[Wanted]) -> list[Given]:
        """Rows for the canvases of a burst. One that was interrupted may begin again.

        Raises:
            KeysDoNotFit: there are not enough beside those of other bursts.
        """
        with self._lock:
            self._num_bursts += 1
            self._drop(burst)
            given = self._give(burst, wanted)
            if given is None and not self._used:  # free rows are in pieces between those that wait
                self._clear()
                given = self._give(burst, wanted)
        if given is None:
            first, end = self._bounds
            total = sum(own.num_rows for own in wanted)
            raise KeysDoNotFit(f"{total} rows of keys, where there is room for {end - first}")
        return given

    def end(self, burst: int, left: Iterable[tuple[Hashable, Span]] = ()) -> None:
        """Ends a burst; `left` are the rows that its canvases go on with, and what they are a function of."""
        with self._lock:
            if burst not in self._used:  # everything was forgotten meanwhile
                return
            for content, span in left:
                self._used[burst].remove(span)
                self._waiting.setdefault(content, []).append(_Waiting(span, self._num_bursts))
            self._drop(burst)
            for content, own in list(self._waiting.items()):
                if own[-1].since >= self._num_bursts - IDLE_BURSTS:
                    break
                self._forget(content)

    def _clear(self) -> None:
        self._free, self._used, self._waiting = [self._bounds], {}, {}

    def _drop(self, burst: int) -> None:
        for span in self._used.pop(burst, []):
            self._release(span)

    def _give(self, burst: int, wanted: Sequence[Wanted]) -> list[Given] | None:
        """Rows for all canvases, those that are held first; None if there are not enough in one piece."""
        held = [self._take(own.content) for own in wanted]
        given: list[Given] = []
        for own, span in zip(wanted, held, strict=True):
            are_held = span is not None
            while span is None and (span := self._cut(own.num_rows)) is None and self._waiting:
                self._forget(next(iter(self._waiting)))
            if span is None:
                for other in [*held[len(given) :], *(before.span for before in given)]:
                    if other is not None:
                        self._release(other)
                return None
            given.append(Given(span, are_held))
        self._used[burst] = [own.span for own in given]
        return given

    def _take(self, content: Hashable | None) -> Span | None:
        """The rows that wait with a content, which wait no more."""
        waiting = self._waiting.get(content) if content is not None else None
        if not waiting:
            return None
        span = waiting.pop().span
        if not waiting:
            del self._waiting[content]
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
