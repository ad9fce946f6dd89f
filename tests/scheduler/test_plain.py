"""What NumPy, pandas, Arrow and iterators hand over, as plain Python values."""

from __future__ import annotations

from array import array
from collections import deque
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask import InvalidRequest, SamplingParams, Threshold
from remask.scheduler.params import resolve
from remask.scheduler.plain import listed, plain

MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array("x"), "x"),
        (np.array([1, 2], np.uint16), [1, 2]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(["a", "b"], object), ["a", "b"]),
        ([np.array([1]), (2, np.int8(3))], [[1], [2, 3]]),
        (np.array([MESSAGE], object), [MESSAGE]),
        (torch.tensor([1, 2]), [1, 2]),
        (array("q", [1, 2]), [1, 2]),
        (range(3), [0, 1, 2]),
        (iter("ab"), ["a", "b"]),
        ((text for text in ("a", "b")), ["a", "b"]),
        (deque([1]), [1]),
        ({"a": 1}.values(), [1]),
        (MappingProxyType({np.int64(7): np.float64(1)}), {7: 1.0}),
    ],
)
def test_values_become_what_they_stand_for(value: Any, expected: Any) -> None:
    found = plain(value)
    assert (found, repr(found)) == (expected, repr(expected)), "also their types"


def test_columns_of_arrow_are_lists() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"prompt": ["a", "b"], "ids": [[1], [2, 3]]})
    assert plain(table["prompt"]) == ["a", "b"]
    assert plain(table["ids"]) == [[1], [2, 3]]
    assert plain(table["ids"][1]) == [2, 3]


@pytest.mark.parametrize(
    "value", ["text", b"bytes", {1, 2}, 7, None, {"a": 1}, np.int64(7), int, Threshold(0.5)]
)
def test_what_has_no_entries_in_order_is_no_list(value: Any) -> None:
    assert listed(value) is None


def test_no_more_is_taken_from_an_iterator_than_is_wanted() -> None:
    source = iter(range(10))
    assert listed(source, 3) == [0, 1, 2]
    assert next(source) == 3


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    )
)
def test_plain_values_stay_as_they_are(value: Any) -> None:
    assert plain(value) == value


def test_deep_nesting_ends() -> None:
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    plain(nested)
    with pytest.raises(InvalidRequest, match="stop"):
        resolve({"stop": nested})


def test_parameters_may_be_numpy_numbers_and_arrays() -> None:
    fields: dict[str, Any] = {
        "max_tokens": np.int64(8),
        "temperature": np.float32(0.5),
        "seed": np.uint8(3),
        "ignore_eos": np.bool_(True),
        "stop": np.array(["a", "b"]),
        "stop_token_ids": np.array([5]),
        "logit_bias": {np.int64(7): np.float64(1)},
        "unmask": {"type": "threshold", "t": np.float64(0.5)},
        "priority": np.int16(2),
    }
    expected = resolve(
        {
            "max_tokens": 8,
            "temperature": 0.5,
            "seed": 3,
            "ignore_eos": True,
            "stop": ["a", "b"],
            "stop_token_ids": [5],
            "logit_bias": {7: 1.0},
            "unmask": "threshold:0.5",
            "priority": 2,
        }
    )
    assert resolve(fields) == expected
    fields["unmask"] = Threshold(np.float64(0.5))  # type: ignore[arg-type]
    assert resolve(SamplingParams(**fields)) == expected
    assert resolve(MappingProxyType(fields)) == expected  # type: ignore[arg-type]


def test_a_preset_is_cut_to_a_numpy_canvas() -> None:
    for params in (
        SamplingParams.preset("wino", max_tokens=np.int64(8)),
        {"preset": "wino", "max_tokens": np.int8(8)},
    ):
        assert resolve(params).block_length == 8  # type: ignore[arg-type]
