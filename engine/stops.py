"""Stop strings: the position in a canvas at which a text ends.

A bidirectional model commits tokens in any order, so a text is searched when one of its blocks is finished.
It ends at the token that completes a stop string, as if it had been searched after each token. Earlier blocks
are not decoded again, except for the tokens at their end in which a stop string can begin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence

import numpy as np

from remask.scheduler.canvas import Canvas, CanvasState, TextStop

# Characters at the beginning of a decoded piece that may differ from those of the whole text: a tokenizer may
# strip a space there, or see the rest of a character (of at most four bytes, each a token of its own).
EDGE_LEN = 8
UNREADABLE = "\ufffd"


class StopStrings:
    """Searches finished blocks for stop strings.

    Args:
        strings: the stop strings, not empty. If one token completes several, the first in this order counts.
        decode: text of token ids.
        silent_ids: ids that `decode` omits.
    """

    def __init__(
        self, strings: Sequence[str], decode: Callable[[list[int]], str], silent_ids: Collection[int] = ()
    ) -> None:
        self._strings, self._decode = strings, decode
        self._silent_ids = np.array(sorted(silent_ids), dtype=np.int64)

    def __call__(self, canvas: Canvas, state: CanvasState) -> TextStop | None:
        """The stop string in the blocks that a burst has finished, unless a stop id comes before it.

        Args:
            canvas: the canvas before the burst; its finished blocks contain no stop.
            state: its state after the burst.
        """
        spec = canvas.spec
        start, end = (number * spec.block_length for number in (canvas.state.block, state.block))
        tokens = spec.canvas_tokens(state)[:end]
        stop = spec.first_stop(tokens[start:])
        if stop is not None:
            tokens = tokens[: start + stop]
        # Silent tokens are left out, so that a long run of them before a block is not decoded again.
        (places,) = (~np.isin(tokens, self._silent_ids)).nonzero()
        num_seen = int(np.searchsorted(places, start))
        found = find_stop(tokens[places].tolist(), self._strings, self._decode, start=num_seen)
        return None if found is None else TextStop(int(places[found.num_tokens - 1]) + 1, found.string)


def find_stop(
    ids: list[int], strings: Sequence[str], decode: Callable[[list[int]], str], *, start: int = 0
) -> TextStop | None:
    """The first stop string that the tokens complete; None if they complete none.

    Args:
        ids: tokens of a text.
        strings: the stop strings.
        decode: text of token ids. The text of a part equals that of the whole except for up to `EDGE_LEN`
            characters at its beginning.
        start: number of leading tokens that are known to complete no stop string.
    """
    first, num_known = _safe_offset(ids[:start], max(map(len, strings)), decode)

    def completed(num_tokens: int) -> list[str]:
        text = decode(ids[first:num_tokens])[num_known:]
        return [string for string in strings if string in text]

    if not completed(len(ids)):
        return None
    numbers = range(start, len(ids) + 1)
    num_tokens = numbers[bisect_left(numbers, True, key=lambda num: bool(completed(num)))]
    return TextStop(num_tokens, completed(num_tokens)[0])


def _safe_offset(ids: list[int], longest: int, decode: Callable[[list[int]], str]) -> tuple[int, int]:
    """Token to decode from, and number of characters to skip there: a search then finds every stop string
    that
    begins before the end of `ids` and ends after it, and no other."""
    num_wanted = longest + 2 * EDGE_LEN
    num_back = num_wanted
    while num_back < len(ids):
        for first in range(len(ids) - num_back, max(-1, len(ids) - num_back - 4), -1):
            text = decode(ids[first:])
            if not text.startswith(UNREADABLE):  # else it may begin inside a character
                break
        # Unreadable characters at the end may be the beginning of one that the next tokens complete.
        num_readable = len(text.rstrip(UNREADABLE))
        if num_readable >= num_wanted:
            return first, num_readable - longest - EDGE_LEN
        num_back *= 2
    return 0, 0
