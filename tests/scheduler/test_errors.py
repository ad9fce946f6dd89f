"""Messages of errors: short, however large the value at fault is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remask import InvalidRequest

values = st.recursive(
    st.none() | st.integers() | st.text("ab'\\n") | st.binary() | st.floats(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text("ab"), inner),
)


@given(values)
def test_a_value_is_shown_as_python_writes_it_and_cut(value: object) -> None:
    shown = str(InvalidRequest("n", value, "is wrong")).removeprefix("n: is wrong (got ").removesuffix(")")
    if len(repr(value)) <= 120:
        assert shown == repr(value)
    else:
        assert shown.endswith("...")
        assert len(shown) == 120


def test_of_a_large_value_only_what_is_shown_is_written_out() -> None:
    class Item:
        num_written = 0

        def __repr__(self) -> str:
            Item.num_written += 1
            return "item"

    endless: list[object] = []
    endless.append(endless)
    for value in ([Item()] * 10**6, [[Item()] * 10**6] * 2, dict.fromkeys(range(10**5), Item()), endless):
        assert str(InvalidRequest("n", value, "is wrong")).endswith("...)")
    assert Item.num_written < 100
    with pytest.raises(InvalidRequest, match=r"'aaaa.*\.\.\.\)"):
        raise InvalidRequest("n", "a" * 10**6, "is wrong")
