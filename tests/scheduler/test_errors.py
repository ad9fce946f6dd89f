"""Errors: a value is shown as `repr` writes it, and costs no more than what is shown of it."""

from __future__ import annotations

import pickle
import tracemalloc
from array import array
from collections import OrderedDict, UserList, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remask import InvalidRequest
from remask.scheduler.errors import did_you_mean, shown
from remask.scheduler.params import resolve


class Pair(NamedTuple):
    a: Any
    b: Any


class Both(msgspec.Struct):
    a: Any
    b: Any


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(SCALARS)
        | st.frozensets(SCALARS)
        | st.builds(Pair, inner, inner)
        | st.builds(Both, a=inner, b=inner)
    ),
    max_leaves=60,
)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails where more than a megabyte is allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


class UserText(str):
    """Text of a subclass, as NumPy's."""


@given(VALUES)
def test_a_value_is_shown_as_the_start_of_its_repr(value: Any) -> None:
    whole = repr(value)
    if len(whole) <= 120:
        assert shown(value) == whole
        return
    assert len(shown(value)) == 120
    if not any(quote in whole for quote in "'\""):  # the quotes of a text depend on all of it
        assert shown(value) == whole[:117] + "..."


def test_a_large_value_is_not_formatted_whole() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    text, ids = "x" * 10**7, [1] * 10**6
    values = [
        *(text, text.encode(), ids, tuple(ids), {*range(10**6)}, frozenset(range(10**6))),
        *({"ids": ids}, {text: 1}, {text}, [[text]], nested, Pair(text, 1), Both(1, ids), UserText(text)),
        *(deque(ids), OrderedDict.fromkeys(range(10**6)), array("i", ids), np.array(ids)),
    ]
    with little_memory():
        for value in values:
            error = InvalidRequest("prompt", value, "is wrong")
            assert str(error).endswith(("...)", " entries>)"))
            assert len(str(error)) < 200


def test_no_more_of_the_entries_is_formatted_than_is_shown() -> None:
    class Counting:
        num_formatted = 0

        def __repr__(self) -> str:
            Counting.num_formatted += 1
            return "c"

    many = [Counting() for _ in range(10_000)]
    values = [
        many,
        tuple(many),
        {*many},
        dict(enumerate(many)),
        [[many] * 100],
        UserList(many),
        Both(many, many),
    ]
    for value in values:
        Counting.num_formatted = 0
        assert len(str(InvalidRequest("prompt", value, "is wrong"))) < 200
        assert Counting.num_formatted <= 120


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 10**7: 1},
        {("x" * 10**7,): 1},
        {"preset": "x" * 10**7},
        {"rank": "x" * 10**7},
        {"unmask": "x" * 10**7},
        {"unmask": {"type": "x" * 10**7}},
        {"unmask": {"type": "threshold", "x" * 10**7: 1}},
        {"unmask": {"type": "schedule", "score": "x" * 10**7}},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_large_name_is_not_formatted_whole(fields: dict[Any, Any]) -> None:
    with little_memory(), pytest.raises(InvalidRequest) as caught:
        resolve(fields)
    assert len(str(caught.value)) < 1200


def test_a_large_value_is_not_compared_whole_with_known_names() -> None:
    ids = ["x"] * 10**6
    with little_memory():
        assert did_you_mean(ids, ["a", "b"]) == "known: a, b"


def test_a_large_argument_of_a_policy_is_cut_in_the_message() -> None:
    for text in (f"threshold:0.5,{'x' * 10**6}", f"threshold:{'x' * 10**6}=1", f"threshold:t={'x' * 10**6}"):
        with pytest.raises(InvalidRequest) as caught:
            resolve({"unmask": text})
        assert len(str(caught.value)) < 600


def test_a_word_of_the_user_cannot_name_another_field() -> None:
    with pytest.raises(InvalidRequest, match=r"^rank: "):
        resolve({"rank": "top - at `$.seed`"})


def test_a_repr_that_fails_does_not_hide_the_error() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert str(InvalidRequest("seed", Broken(), "is wrong")) == "seed: is wrong (got <Broken>)"
    assert str(InvalidRequest("seed", 10**5000, "is wrong")) == "seed: is wrong (got <int>)"
    error = pickle.loads(pickle.dumps(InvalidRequest("seed", "x", "is wrong").at("prompt 1")))  # noqa: S301
    assert str(error) == "prompt 1: seed: is wrong (got 'x')"
