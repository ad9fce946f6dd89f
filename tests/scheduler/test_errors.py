"""Errors: a value is shown as `repr` writes it, and costs no more than what is shown of it."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from remask import InvalidRequest
from remask.scheduler.errors import shown

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=60,
)


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
    values = ["x" * 10**7, b"x" * 10**7, [0] * 10**6, {"ids": [1] * 10**6}, [["x" * 10**7]], nested]
    tracemalloc.start()
    for value in values:
        error = InvalidRequest("prompt", value, "is wrong")
        assert str(error).endswith("...)")
        assert len(str(error)) < 200
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_repr_that_fails_does_not_hide_the_error() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert str(InvalidRequest("seed", Broken(), "is wrong")) == "seed: is wrong (got <Broken>)"
    assert str(InvalidRequest("seed", 10**5000, "is wrong")) == "seed: is wrong (got <int>)"
    error = pickle.loads(pickle.dumps(InvalidRequest("seed", "x", "is wrong").at("prompt 1")))  # noqa: S301
    assert str(error) == "prompt 1: seed: is wrong (got 'x')"
