"""The sizes that bursts are padded to."""

from __future__ import annotations

from remask.scheduler.canvas import new_canvas
from remask.scheduler.params import resolve
from remask.workers.burst.graphs import padding_for

PARAMS = resolve({"max_tokens": 12, "block_length": 6})
SPEC = new_canvas("r", 0, [5, 11], PARAMS, seed=0, sample=0, mask_id=0, stop_ids=[3]).spec


def test_bursts_of_many_rows_take_the_plain_path() -> None:
    assert padding_for([SPEC] * 7, [500] * 7) is not None
    assert padding_for([SPEC] * 9, [500] * 9) is None


def test_sizes_are_shared_and_waste_little() -> None:
    assert len({padding_for([SPEC], [length]) for length in range(100, 129)}) == 1
    for length in range(64, 4000, 7):
        padding = padding_for([SPEC], [length])
        assert padding is not None
        assert 0 <= padding.main_rows - length < max(64, length / 8)
