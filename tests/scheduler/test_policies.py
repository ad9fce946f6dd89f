"""Policies as users write them, and the schedule's arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remask
from remask import CappedThreshold, Factor, InvalidRequest, Schedule, Threshold, Wino
from remask.scheduler import policies
from remask.scheduler.policies import registry
from remask.scheduler.policies.base import share_steps
from remask.scheduler.policies.parsing import parse_policy
from remask.workers import strategies
from remask.workers.strategies import kernel_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("threshold", Threshold(0.9)),
        ("threshold:0.7", Threshold(0.7)),
        ("threshold:t=0.7", Threshold(0.7)),
        ({"type": "threshold", "t": 0.7}, Threshold(0.7)),
        (Threshold(0.7), Threshold(0.7)),
        ("schedule:30,score=margin", Schedule(30, "margin")),
        ("schedule:steps=None", Schedule()),
        ("factor:0.5,strict=true", Factor(0.5, strict=True)),
        ("capped_threshold:0.6", CappedThreshold(0.6)),
    ],
)
def test_an_object_a_dict_and_text_mean_the_same(value: object, expected: object) -> None:
    assert parse_policy("unmask", value) == expected


def test_wino_reads_its_fields_from_text() -> None:
    assert parse_policy("remask", "wino:t2=0.8,budget=cur_accept") == Wino(0.8, budget="cur_accept")


@pytest.mark.parametrize(
    ("value", "named", "hint"),
    [
        ("treshold:0.9", "unmask", "'threshold'"),
        ("wino", "unmask", "is a policy for remask"),
        ("confidence", "unmask", "known: schedule"),
        ("threshold:1.5", "unmask.t", "1"),
        ("threshold:-0.1", "unmask.t", "0"),
        ("threshold:high", "unmask.t", "float"),
        ("threshold:0.5,0.6", "unmask", "cannot place"),
        ("threshold:0.5,t=0.6", "unmask.t", "twice"),
        ({"type": "threshold", "tau": 0.5}, "unmask.tau", "known: t"),
        ({"t": 0.5}, "unmask", "unknown policy"),
        ("schedule:0", "unmask.steps", "1"),
        ("schedule:score=best", "unmask.score", "best"),
        (0.9, "unmask", "threshold:0.9"),
        (Wino(), "unmask", "policy object"),
    ],
)
def test_a_wrong_policy_is_refused_by_name_with_the_fix(value: object, named: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_policy("unmask", value)
    assert caught.value.parameter == named
    assert hint in str(caught.value)


def test_every_spec_has_a_kernel_of_its_name() -> None:
    kinds = {**registry().unmask, **registry().remask}
    own = {name: kind for name, kind in kinds.items() if kind.kernel is None}
    assert len(own) == 14
    assert all(callable(kernel_of(kind)) for kind in own.values())
    folder = Path(strategies.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "view"}
    assert files == own.keys()


def test_the_package_exports_every_policy() -> None:
    kinds = {**registry().unmask, **registry().remask}
    names = {kind.__name__ for kind in kinds.values() if kind.kernel is None}
    assert names <= {*remask.__all__} & {*policies.__all__}
    assert all(getattr(remask, name) is getattr(policies, name) for name in names)


@given(st.integers(1, 500), st.lists(st.integers(1, 64), min_size=1, max_size=12))
def test_steps_are_shared_by_length_with_at_least_one_each(total: int, block_lens: list[int]) -> None:
    shares = share_steps(total, block_lens)
    slots = sum(block_lens)
    assert min(shares) >= 1
    assert sum(shares) >= total
    if total * min(block_lens) >= slots:  # every block has a whole step of its own
        assert sum(shares) == total
    for share, length in zip(shares, block_lens, strict=True):
        assert share == 1 or abs(share - total * length / slots) < 1


def test_equal_remainders_go_to_the_lower_blocks() -> None:
    assert share_steps(11, [48]) == [11]
    assert share_steps(10, [16, 16, 16]) == [4, 3, 3]
    assert share_steps(4, [32, 32, 8]) == [2, 2, 1]
