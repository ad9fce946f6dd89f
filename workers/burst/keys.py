"""The kept rows of a burst's canvases."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from remask.scheduler.canvas import CanvasSpec, CanvasState
from remask.scheduler.light_rows import LightRows
from remask.workers.key_store import KeyStore, Span, Wanted
from remask.workers.rows.kept import KeptCanvases, KeptRows


class BurstKeys:
    """The rows that a burst has in a store until it ends.

    Args:
        store: of the worker.
        burst_id: of the burst.
        specs: of its canvases.
        states: of those that reuse keys, by their places.

    Attributes:
        missing: canvases whose next forward is light and whose keys the store does not hold.

    Raises:
        KeysDoNotFit: there are not enough rows.
    """

    def __init__(
        self,
        store: KeyStore,
        burst_id: int,
        specs: Sequence[CanvasSpec],
        states: Mapping[int, CanvasState],
    ) -> None:
        self._store, self._burst_id, self._specs = store, burst_id, specs
        self._lens = {canvas: state.sequence_len for canvas, state in states.items()}
        wanted = {
            canvas: Wanted(_content(specs[canvas], state), specs[canvas].num_key_rows(state.sequence_len))
            for canvas, state in states.items()
            if not (state.finished or state.fault)
        }
        self._spans: dict[int, Span] = {}
        self.missing: list[int] = []
        given = store.begin(burst_id, list(wanted.values()))
        for (canvas, own), (span, are_held) in zip(wanted.items(), given, strict=True):
            self._spans[canvas] = span
            if own.content is not None and not are_held:
                self.missing.append(canvas)

    def rows(self, blocks: Sequence[int], block_forwards: Sequence[int]) -> KeptCanvases:
        """The rows of the next forward.

        Args:
            blocks: the active block of each canvas of the burst.
            block_forwards: its forwards so far.
        """
        return {
            canvas: KeptRows(span[0], self._light(canvas, blocks[canvas], block_forwards[canvas]))
            for canvas, span in self._spans.items()
        }

    def later_rows(self, blocks: Sequence[int], block_forwards: Sequence[int]) -> KeptCanvases:
        """The rows of the forwards after the next one until the burst ends or a full one is due; of canvases
        whose next two are full none. The arguments are those of `rows`."""
        found = {}
        for canvas, own in self.rows(blocks, block_forwards).items():
            light = own.light or self._light(canvas, blocks[canvas], block_forwards[canvas] + 1)
            if light is not None:
                found[canvas] = own._replace(light=light)
        return found

    def end(self, states: Sequence[CanvasState]) -> None:
        """Leaves the rows that the canvases go on with to the store; `states` are those after the burst."""
        contents = {canvas: _content(self._specs[canvas], states[canvas]) for canvas in self._spans}
        self._store.end(
            self._burst_id,
            [(content, self._spans[canvas]) for canvas, content in contents.items() if content is not None],
        )

    def _light(self, canvas: int, block: int, num_forwards: int) -> LightRows | None:
        return self._specs[canvas].next_light(self._lens[canvas], block, num_forwards)


def _content(spec: CanvasSpec, state: CanvasState) -> Hashable | None:
    """What the keys of a canvas are a function of, and which of them a light forward may have written over;
    None: its next forward is full."""
    if not state.full_tokens:
        return None
    return state.full_tokens, spec.slots, spec.block_length, state.block, spec.reuse, spec.is_guided
