"""The rules of scheduling, one by one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remask.benchmarks.simulation import Requests
from remask.scheduler.planning import (
    AGEING_SECONDS,
    MAX_BURST,
    MAX_PASSED,
    Budget,
    Pace,
    burst_len,
    order_of,
    split,
    take,
)

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
def test_each_canvas_is_taken_that_fits_with_those_before_it(
    lens: list[int], max_rows: int, max_seqs: int
) -> None:
    requests = Requests()
    queue = [requests.make(n, 1).canvases[0] for n in lens]
    candidates = iter(queue)
    taken, passed = take(candidates, Budget(max_rows, max_seqs))
    rest = list(candidates)
    assert sorted([*taken, *passed, *rest], key=queue.index) == queue, "none is lost"
    assert bool(taken) == bool(queue)
    assert taken[:1] == queue[:1]
    assert len(taken) <= max_seqs
    num_rows = 0
    for canvas in queue:
        if canvas in taken:
            num_rows += canvas.num_rows
        elif canvas in passed:
            assert num_rows + canvas.num_rows > max_rows
        else:
            assert len(taken) == max_seqs or num_rows >= max_rows, "the search ended early"
    assert num_rows <= max_rows or len(taken) == 1


def test_the_search_for_smaller_canvases_ends() -> None:
    requests = Requests()
    queue = [requests.make(n, 1).canvases[0] for n in (50, *[60] * 1000)]
    taken, passed = take(iter(queue), Budget(100, 8))
    assert (len(taken), len(passed)) == (1, MAX_PASSED)


@pytest.mark.parametrize(("num_quiet", "expected"), [(0, 1), (1, 2), (2, 4), (10**6, MAX_BURST)])
def test_bursts_grow_while_nobody_waits_or_comes(num_quiet: int, expected: int) -> None:
    assert burst_len(None, others_wait=False, num_quiet=num_quiet, step_seconds=0.001) == expected
    assert burst_len(3, others_wait=False, num_quiet=num_quiet, step_seconds=9.0) == 3


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["threshold", "schedule", "factor"])), max_size=20))
def test_suspects_are_split_by_who_has_run_or_else_in_halves_of_few_kinds(
    made: list[tuple[bool, str]],
) -> None:
    requests, suspects = Requests(), []
    for has_run, unmask in made:
        (canvas,) = requests.make(1, 4, unmask=unmask).canvases
        canvas.state = msgspec.structs.replace(canvas.state, num_forwards=int(has_run))
        suspects.append(canvas)
    first, second = split(suspects)
    assert sorted([*first, *second], key=suspects.index) == suspects, "none is lost"
    if len({has_run for has_run, _ in made}) == 2:
        assert [has_run for has_run, _ in made].count(False) == len(first)
        assert not any(canvas.state.num_forwards for canvas in first)
    else:
        assert len(second) - len(first) in (0, 1)
        assert len({type(c.spec.unmask) for c in first} & {type(c.spec.unmask) for c in second}) <= 1


@pytest.mark.parametrize(
    ("step_seconds", "expected"), [(0.0, 1), (0.001, MAX_BURST), (0.01, 5), (0.02, 2), (0.06, 1)]
)
def test_a_burst_is_over_in_a_moment_while_others_wait(step_seconds: float, expected: int) -> None:
    for num_quiet in (0, 100):
        found = burst_len(None, others_wait=True, num_quiet=num_quiet, step_seconds=step_seconds)
        assert found == expected


def test_a_step_of_more_rows_is_expected_to_take_longer_and_one_of_fewer_not_less() -> None:
    pace = Pace(step_seconds=0.01, num_rows=100)
    assert [pace.step_seconds_of(rows) for rows in (1, 100, 250)] == [0.01, 0.01, 0.025]


@pytest.mark.parametrize(("step_seconds", "expected"), [(0.0, 8), (0.02, 8), (0.05, 4), (0.15, 1), (9.0, 1)])
def test_a_burst_of_slow_steps_is_short(step_seconds: float, expected: int) -> None:
    assert burst_len(None, others_wait=False, num_quiet=9, step_seconds=step_seconds) == expected
