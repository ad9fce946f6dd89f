"""The rows that a worker keeps keys in: bounded, never shared, and what they hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remask.workers.key_store import IDLE_BURSTS, Given, KeysDoNotFit, KeyStore, Wanted


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(1, 60), first=st.integers(0, 3))
def test_no_rows_are_given_twice_and_those_that_are_held_hold_what_was_left(
    seed: int, num_rows: int, first: int
) -> None:
    rng, store, written = random.Random(seed), KeyStore(first, num_rows), dict[int, tuple[int, int] | None]()
    contents = [(number, rng.randint(1, 12)) for number in range(8)]
    for _ in range(30):
        wanted = [
            Wanted(content if rng.random() < 0.8 else None, content[1])
            for content in rng.sample(contents, rng.randint(0, 5))
        ]
        if sum(own.num_rows for own in wanted) > num_rows:
            with pytest.raises(KeysDoNotFit):
                store.begin(0, wanted)
            continue
        left = []
        for own, (span, are_held) in zip(wanted, store.begin(0, wanted), strict=True):
            rows = range(*span)
            assert len(rows) == own.num_rows
            assert first <= rows[0] <= rows[-1] < first + num_rows
            assert not set(rows) & {row for _, other in left for row in range(*other)}
            assert not are_held or {written[row] for row in rows} == {own.content}
            for row in rows:
                written[row] = own.content  # type: ignore[assignment]
            left.append((own.content, span))
        if rng.random() < 0.9:  # else the burst was interrupted
            store.end(0, [(content, span) for content, span in left if content is not None])
        else:
            written |= {row: None for _, span in left for row in range(*span)}


def test_the_longest_waiting_make_room() -> None:
    store = KeyStore(0, 10)
    for content in "abc":
        (given,) = store.begin(0, [Wanted(content, 4)])
        assert not given.are_held
        store.end(0, [(content, given.span)])
    assert [given.are_held for given in store.begin(0, [Wanted("b", 4), Wanted("c", 4)])] == [True, True]


def test_rows_that_nobody_comes_for_are_free_after_a_while() -> None:
    store = KeyStore(1, 10)
    (given,) = store.begin(0, [Wanted("a", 10)])
    store.end(0, [("a", given.span)])
    for _ in range(IDLE_BURSTS):
        assert not store.is_empty
        store.begin(0, [])
        store.end(0, [])
    store.begin(0, [])
    store.end(0, [])
    assert store.is_empty


def test_rows_in_pieces_are_joined_or_made_anew() -> None:
    store = KeyStore(0, 9)
    given = store.begin(0, [Wanted(name, 3) for name in "abc"])
    store.end(0, [("b", given[1].span)])
    assert store.begin(0, [Wanted("b", 3), Wanted(None, 6)]) == [Given((0, 3), False), Given((3, 9), False)]
