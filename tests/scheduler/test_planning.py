"""The rules of scheduling, one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remask.benchmarks.simulation import Requests
from remask.scheduler.planning import AGEING_SECONDS, MAX_BURST, Budget, burst_len, order_of, take

priorities = st.integers(-(2**31), 2**31 - 1)
times = st.floats(0, 1e6)


@given(priorities, times, times)
def test_within_a_class_the_first_to_come_goes_first(priority: int, first: float, second: float) -> None:
    early, late = sorted((first, second))
    assert order_of(priority, early, 0) < order_of(priority, late, 1)


@given(st.integers(-1000, 1000), st.integers(0, 1000), times)
def test_waiting_a_minute_for_each_class_is_enough_to_go_first(
    urgent: int, num_classes: int, arrival: float
) -> None:
    waited = order_of(urgent + num_classes, arrival, 0)
    assert waited < order_of(urgent, arrival + AGEING_SECONDS * (num_classes + 0.01), 1)
    assert num_classes == 0 or order_of(urgent, arrival + AGEING_SECONDS * (num_classes - 0.01), 1) < waited


@given(
    st.lists(st.integers(1, 50), max_size=12),
    st.integers(1, 120),
    st.integers(1, 6),
)
def test_the_longest_beginning_that_fits_is_taken(lens: list[int], max_rows: int, max_seqs: int) -> None:
    requests = Requests()
    queue = [requests.make(n, 1).canvases[0] for n in lens]
    taken = take(iter(queue), Budget(max_rows, max_seqs))
    assert taken == queue[: len(taken)]
    assert bool(taken) == bool(queue)
    rows = [canvas.num_rows for canvas in queue]
    assert len(taken) <= max_seqs
    assert len(taken) == 1 or sum(rows[: len(taken)]) <= max_rows
    if 0 < len(taken) < min(len(queue), max_seqs):
        assert sum(rows[: len(taken) + 1]) > max_rows, "one more would have fitted"


@pytest.mark.parametrize(
    ("others_wait", "num_quiet", "expected"),
    [(True, 0, 1), (True, 100, 1), (False, 0, 1), (False, 1, 2), (False, 2, 4), (False, 10**6, MAX_BURST)],
)
def test_bursts_grow_while_nobody_waits_or_comes(others_wait: bool, num_quiet: int, expected: int) -> None:
    assert burst_len(None, others_wait=others_wait, num_quiet=num_quiet) == expected
    assert burst_len(3, others_wait=others_wait, num_quiet=num_quiet) == 3
