"""The kept rows of a burst's canvases."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from remask.scheduler.light_rows import LightRows
from remask.workers.burst.state import BurstState
from remask.workers.key_store import KeyStore, Span, Wanted
from remask.workers.rows.kept import KeptCanvases, KeptRows


class BurstKeys:
    """The rows that a burst on the host has in a store. Its canvases keep them until it ends.

    Args:
        state: of the burst.
        store: of the worker.

    Attributes:
        missing: canvases whose next forward is light and whose keys the store does not hold.
    """

    def __init__(self, state: BurstState, store: KeyStore) -> None:
        self._state, self._store, self._spans = state, store, dict[int, Span]()
        running = [c for c, spec in enumerate(state.specs) if spec.reuse is not None and not state.paused[c]]
        wanted = [
            Wanted(self._content(c), state.specs[c].num_key_rows(state.sequence_len(c))) for c in running
        ]
        self.missing: list[int] = []
        for canvas, own, given in zip(running, wanted, store.begin(wanted), strict=True):
            self._spans[canvas] = given.span
            if own.content is not None and not given.are_held:
                self.missing.append(canvas)

    def rows(self) -> KeptCanvases:
        """The rows of the next forward."""
        return {canvas: KeptRows(span[0], self._light(canvas)) for canvas, span in self._spans.items()}

    def end(self) -> None:
        """Leaves the rows that the canvases go on with to the store."""
        left = [(self._content(canvas), span) for canvas, span in self._spans.items()]
        self._store.end((content, span) for content, span in left if content is not None)

    def _light(self, canvas: int) -> LightRows | None:
        """The rows of the next forward if it is light."""
        state = self._state
        block, count = int(state.block[canvas]), int(state.block_forwards[canvas])
        return state.specs[canvas].next_light(state.sequence_len(canvas), block, count)

    def _content(self, canvas: int) -> Hashable | None:
        """What the keys of a canvas are a function of, and which of them a light forward may have written
        over; None: its next forward is full."""
        state, spec = self._state, self._state.specs[canvas]
        if bool(state.finished[canvas]) or self._light(canvas) is None:
            return None
        assert state.full_tokens is not None, "it reuses keys"
        tokens = state.full_tokens[slice(*state.cu_tokens[canvas : canvas + 2])].numpy()
        place = (spec.slots, spec.block_length, int(state.block[canvas]), spec.reuse, spec.is_guided)
        return (tokens.astype(np.int32).tobytes(), *place)
