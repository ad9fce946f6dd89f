"""Sizes that the tensors of a burst are padded to, so that bursts of different canvases have equal shapes."""

from __future__ import annotations

from typing import NamedTuple


class Padding(NamedTuple):
    """Minimum sizes to pad a burst to, so that bursts share CUDA graphs. 0: no padding.

    Rows, slots and members of groups are padded with the last canvas of the burst, which must be finished.
    """

    tokens: int = 0  # of all sequences
    main_rows: int = 0
    fresh_keys: int = 0  # of a pack, before the kept ones
    gathered: int = 0  # kept rows among the keys
    slots: int = 0  # of active blocks
    shadow_rows: int = 0
    max_keys: int = 0  # rows of a sequence, including padding
    max_queries: int = 0  # candidates of a sequence, including padding
    widest: int = 0  # slots of a block
    canvas_len: int = 0
    num_blocks: int = 0  # of all canvases together
    num_stops: int = 0  # ids that end canvases; equal lists count once
    group_size: int = 0  # canvases of a policy's kind


NO_PADDING = Padding()
