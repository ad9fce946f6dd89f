"""The sizes that bursts are padded to."""

from __future__ import annotations

from typing import Any

from remask import SamplingParams
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.params import resolve
from remask.workers.burst.graphs import padding_for


def make(i: int, canvas_len: int, seed: int = 0, **fields: Any) -> Canvas:
    block = {} if "dream" in fields.get("unmask", "") else {"block_length": min(6, canvas_len)}
    params = resolve(SamplingParams(max_tokens=canvas_len, **block, **fields))
    prompt = [5 + i % 3, 11, 7, 9, 12][: 2 + i % 4]
    return new_canvas("r", i, prompt, params, seed=seed, sample=i, mask_id=0, stop_ids=[3])


def test_bursts_of_many_rows_take_the_plain_path() -> None:
    spec = make(0, 12).spec
    assert padding_for([spec] * 7, [500] * 7) is not None
    assert padding_for([spec] * 9, [500] * 9) is None


def test_sizes_are_shared_and_waste_little() -> None:
    spec = make(0, 12).spec
    rooms = {padding_for([spec], [length]) for length in range(100, 129)}
    assert len(rooms) == 1
    for length in range(64, 4000, 7):
        padding = padding_for([spec], [length])
        assert padding is not None
        assert 0 <= padding.main_rows - length < max(64, length / 8)
