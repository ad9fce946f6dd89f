"""Sizes that a burst's tensors are filled up to, so that bursts of different canvases have equal shapes."""

from __future__ import annotations

from typing import NamedTuple


class Room(NamedTuple):
    """Least sizes; 0 is what the canvases need.

    Rows, slots and members of groups are filled up with the burst's last canvas, which must have ended.
    """

    main_rows: int = 0
    slots: int = 0  # of active blocks
    shadow_rows: int = 0
    max_keys: int = 0  # rows of a sequence, what fills up included
    max_queries: int = 0  # candidates of a sequence, likewise
    widest: int = 0  # slots of a block
    canvas_len: int = 0
    num_blocks: int = 0  # of all canvases together
    num_stops: int = 0  # ids that end canvases; equal lists count once
    group_size: int = 0  # canvases of a policy's kind


NO_ROOM = Room()
