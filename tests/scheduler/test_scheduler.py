"""The scheduler against a simulated worker: budgets, order, and every canvas ending once."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remask.scheduler.canvas import TOKEN, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import resolve
from remask.scheduler.request import Request
from remask.scheduler.scheduler import IDLE_BURST, Scheduler

MASK = 0


class Simulator:
    """Takes one token a step, so that the number of forwards of a canvas is known."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def run(self, batch: StepBatch) -> StepResult:
        self.batches.append(batch)
        states = [self._advance(state, batch.num_steps) for state in batch.states]
        return StepResult(burst_id=batch.burst_id, states=states, num_rows=0, seconds=0.0)

    def _advance(self, state: CanvasState, num_steps: int) -> CanvasState:
        assert not state.finished, "a finished canvas is never scheduled"
        tokens = state.token_array().copy()
        open_slots = np.flatnonzero(tokens == MASK)[:num_steps]
        tokens[open_slots] = 5
        return msgspec.structs.replace(
            state,
            tokens=tokens.tobytes(),
            num_forwards=state.num_forwards + len(open_slots),
            finished=not (tokens == MASK).any(),
        )


class Requests:
    def __init__(self) -> None:
        self.num_canvases = self.count = 0

    def make(self, prompt_len: int, canvas_len: int, n: int = 1, remask: str | None = None) -> Request:
        params = resolve({"max_tokens": canvas_len, "n": n, "temperature": 1.0, "remask": remask})
        request_id = str(self.count)
        self.count += 1
        canvases = [
            new_canvas(
                request_id,
                self.num_canvases + sample,
                [7] * prompt_len,
                params,
                seed=1,
                sample=sample,
                mask_id=MASK,
                stop_ids=[],
            )
            for sample in range(n)
        ]
        self.num_canvases += n
        return Request(request_id, None, [7] * prompt_len, canvases, False, arrival_time=0.0)


def rows_of(batch: StepBatch) -> int:
    return sum(
        state.sequence_len + spec.num_shadow_rows
        for spec, state in zip(batch.specs, batch.states, strict=True)
    )


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), max_num_rows=st.integers(1, 300), max_num_seqs=st.integers(1, 9))
def test_budgets_hold_and_every_request_ends_once_whenever_it_joins(
    seed: int, max_num_rows: int, max_num_seqs: int
) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_rows=max_num_rows, max_num_seqs=max_num_seqs, burst=rng.choice([None, 1, 3])
    )
    simulator, requests, made, discarded = Simulator(), Requests(), [], set()
    ended: Counter[str] = Counter()
    while len(made) < 12 or scheduler.num_live:
        if len(made) < 12 and rng.random() < 0.5:
            made.append(
                requests.make(
                    rng.randint(1, 60), rng.randint(1, 40), rng.randint(1, 3), rng.choice([None, "wino"])
                )
            )
            scheduler.add(made[-1])
        if made and rng.random() < 0.05:
            discarded.add(rng.choice(made).request_id)
            scheduler.discard(discarded)
        batch = scheduler.next_batch()
        if batch is None:
            continue
        assert len(batch.states) <= max_num_seqs
        assert rows_of(batch) <= max_num_rows or len(batch.states) == 1
        ended.update(request.request_id for request in scheduler.update(simulator.run(batch)))
    assert set(ended.values()) <= {1}
    assert ended.keys() >= {request.request_id for request in made} - discarded
    for request in made:
        if request.request_id in ended:
            assert all(c.state.num_forwards == c.spec.canvas_len for c in request.canvases)
            assert all((c.canvas_tokens() == 5).all() for c in request.canvases)
    assert scheduler.next_batch() is None


def test_first_come_is_first_served_even_where_a_later_one_would_fit() -> None:
    scheduler, requests = Scheduler(max_num_rows=100, max_num_seqs=8, burst=1), Requests()
    for prompt_len in (60, 80, 10):
        scheduler.add(requests.make(prompt_len, 10))
    batch = scheduler.next_batch()
    assert batch is not None
    assert [state.sequence_len for state in batch.states] == [70]


def test_running_canvases_keep_their_place() -> None:
    scheduler, requests, simulator = (
        Scheduler(max_num_rows=100, max_num_seqs=2, burst=1),
        Requests(),
        Simulator(),
    )
    for _ in range(4):
        scheduler.add(requests.make(4, 6))
    for _ in range(6):
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.update(simulator.run(batch))
    assert scheduler.num_live == 2
    assert all(len(batch.states) == 2 for batch in simulator.batches)


def test_bursts_are_long_only_while_nobody_waits() -> None:
    scheduler, requests = Scheduler(max_num_rows=50, max_num_seqs=8, burst=None), Requests()
    scheduler.add(requests.make(10, 30))
    alone = scheduler.next_batch()
    assert alone is not None
    assert alone.num_steps == IDLE_BURST
    scheduler.update(Simulator().run(msgspec.structs.replace(alone, num_steps=1)))
    scheduler.add(requests.make(10, 30))
    crowded = scheduler.next_batch()
    assert crowded is not None
    assert (crowded.num_steps, len(crowded.states)) == (1, 1)


@pytest.mark.parametrize("remask", [None, "wino:t2=0.8"])
def test_messages_survive_the_wire(remask: str | None) -> None:
    scheduler, requests = Scheduler(max_num_rows=500, max_num_seqs=8, burst=None), Requests()
    scheduler.add(requests.make(5, 40, n=2, remask=remask))
    batch = scheduler.next_batch()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=StepBatch) == batch


def test_a_canvas_is_cut_into_blocks_of_which_the_last_may_be_shorter() -> None:
    canvas = Requests().make(3, 40).canvases[0]
    assert canvas.spec.block_lens == [32, 8]
    assert np.frombuffer(canvas.spec.slots, TOKEN).tolist() == list(range(3, 43))
    assert (canvas.canvas_tokens() == MASK).all()
