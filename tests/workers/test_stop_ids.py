"""Ids that end canvases: each canvas by its own list, in a table no longer than the lists together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.scheduler.sampling import id_bytes
from remask.workers.burst.stop_ids import StopIds, num_stops

ids = st.integers(0, 2**31 - 1) | st.integers(0, 9)


@given(
    lists=st.lists(st.lists(ids, max_size=5), min_size=1, max_size=5),
    tokens=st.lists(ids, min_size=1, max_size=8),
    least=st.integers(0, 40),
)
def test_a_token_ends_the_canvases_that_list_it(
    lists: list[list[int]], tokens: list[int], least: int
) -> None:
    table = StopIds([id_bytes(own) for own in lists], least)
    found = table.find(torch.tensor([tokens] * len(lists)))
    assert found.tolist() == [[token in own for token in tokens] for own in lists]
    assert len(table.keys) >= least


def test_the_table_is_as_long_as_the_different_lists_together() -> None:
    lists = [id_bytes([1, 2])] * 300 + [id_bytes(range(5000)), id_bytes([])]
    assert num_stops(lists) == len(StopIds(lists).keys) == 5003
    assert len(StopIds(lists, 8192).keys) == 8192
