"""Stop strings: where in the tokens of a canvas a text ends.

A bidirectional model commits in any order, so a text is looked at when a block of it is finished. A stop
string ends it at the token that completes the string, as if the text had been looked at after each token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from remask.scheduler.canvas import Canvas, CanvasState, TextStop


class StopStrings:
    """Looks for stop strings in finished blocks.

    Args:
        strings: not empty; the first in this order where several are completed by the same token.
        decode: text of token ids.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._strings, self._decode = strings, decode

    def __call__(self, canvas: Canvas, state: CanvasState) -> TextStop | None:
        """The stop in the finished blocks of a canvas, if there is one before a stop id."""
        spec = canvas.spec
        tokens = spec.canvas_tokens(state)[: state.block * spec.block_length]
        ends = np.isin(tokens, spec.stop_ids).nonzero()[0]
        return find_stop(tokens[: ends[0] if len(ends) else None].tolist(), self._strings, self._decode)


def find_stop(ids: list[int], strings: Sequence[str], decode: Callable[[list[int]], str]) -> TextStop | None:
    """The first stop string that the tokens complete; None where they complete none."""

    def completed(num_tokens: int) -> list[str]:
        text = decode(ids[:num_tokens])
        return [string for string in strings if string in text]

    if not completed(len(ids)):
        return None
    num_tokens = bisect_left(range(len(ids) + 1), True, key=lambda num: bool(completed(num)))
    return TextStop(num_tokens, completed(num_tokens)[0])
