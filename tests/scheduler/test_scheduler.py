"""The scheduler against simulated workers: budgets, order, aborts, losses, and every request ending once."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import next_of, scheduler_of

from remask.benchmarks.simulation import MASK, PROBE, TOKEN_ID, Requests, SimulatedWorker
from remask.scheduler.canvas import TOKEN, CanvasSpec, CanvasState
from remask.scheduler.light_rows import LightRows
from remask.scheduler.messages import StepBatch
from remask.scheduler.planning import AGEING_SECONDS, MAX_BURST
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler


class Cluster:
    """Simulated workers, each with a queue of bursts; checks every burst that it is given."""

    def __init__(
        self, scheduler: Scheduler, num_workers: int, depth: int, budget: tuple[int, int, int]
    ) -> None:
        self.scheduler, self.depth, self.budget = scheduler, depth, budget
        self.workers = [SimulatedWorker() for _ in range(num_workers)]
        self.queues: list[deque[StepBatch]] = [deque() for _ in range(num_workers)]

    def fill(self, worker: int) -> None:
        while len(self.queues[worker]) < self.depth:
            batch = self.scheduler.next_batch(worker)
            if batch is None:
                return
            self.queues[worker].append(batch)
            held = [
                {(spec.slots, spec.seed) for burst in queue for spec in burst.specs} for queue in self.queues
            ]
            assert sum(map(len, held)) == len(set().union(*held)), "a canvas is with one worker at a time"

    def finish_one(self, worker: int) -> list[Request]:
        if not self.queues[worker]:
            return []
        batch = self.queues[worker].popleft()
        states = self.workers[worker].resolve(batch)
        assert not any(sent.finished for sent in batch.states if not isinstance(sent, int)), "it has ended"
        max_num_rows, max_num_seqs, max_key_rows = self.budget
        rows = [
            spec.num_rows(state.sequence_len, self.light(spec, sent, state))
            for spec, sent, state in zip(batch.specs, batch.states, states, strict=True)
        ]
        key_rows = [
            spec.num_key_rows(state.sequence_len) for spec, state in zip(batch.specs, states, strict=True)
        ]
        assert len(rows) <= max_num_seqs
        is_alone = len(rows) == 1
        assert sum(rows) <= max_num_rows or is_alone, "only a canvas that runs alone may be larger"
        assert sum(key_rows) <= max_key_rows or is_alone
        return self.scheduler.update(self.workers[worker].run(batch))

    @staticmethod
    def light(spec: CanvasSpec, sent: CanvasState | int, state: CanvasState) -> LightRows | None:
        """The rows of the next forward; none where the scheduler does not know whether it is light."""
        if isinstance(sent, int) and spec.reuse is not None:
            return LightRows(*[np.zeros(0, np.int64)] * 3)
        return spec.next_light(state.sequence_len, state.block, state.num_block_forwards)

    def lose(self, worker: int) -> None:
        self.queues[worker].clear()
        self.workers[worker] = SimulatedWorker()
        self.scheduler.lose(worker)


def random_request(rng: random.Random, requests: Requests, now: float) -> Request:
    canvas_len = rng.randint(1, 40)
    return requests.make(
        rng.randint(1, 60),
        canvas_len,
        n=rng.randint(1, 3),
        block_length=rng.randint(1, canvas_len),
        remask=rng.choice([None, "wino"]),
        reuse=rng.choice([None, None, "prefix", "both"]),
        priority=rng.randint(-2, 2),
        stop_after=rng.choice([None, None, rng.randint(1, 45)]),
        arrival_time=now,
    )


def check_ended(request: Request) -> None:
    """Every token was computed once, up to the end of the block that holds a stop string."""
    for canvas in request.canvases:
        expected = canvas.spec.canvas_len
        if canvas.text_stop is not None:
            blocks = -(-canvas.text_stop.num_tokens // canvas.spec.block_length)
            expected = min(expected, blocks * canvas.spec.block_length)
        assert canvas.state.num_forwards == expected
        tokens = canvas.spec.canvas_tokens(canvas.state)
        assert (tokens[:expected] == TOKEN_ID).all()
        assert (tokens[expected:] == MASK).all()


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    max_num_rows=st.integers(1, 300),
    max_num_seqs=st.integers(1, 9),
    num_workers=st.integers(1, 3),
    depth=st.integers(1, 3),
    max_key_rows=st.integers(1, 300),
)
def test_whatever_comes_goes_or_dies_each_request_ends_once(
    seed: int, max_num_rows: int, max_num_seqs: int, num_workers: int, depth: int, max_key_rows: int
) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_rows=max_num_rows,
        max_num_seqs=max_num_seqs,
        burst=rng.choice([None, 1, 3]),
        probe=PROBE,
        max_key_rows=max_key_rows,
    )
    cluster = Cluster(scheduler, num_workers, depth, (max_num_rows, max_num_seqs, max_key_rows))
    requests = Requests()
    made: list[Request] = []
    aborted: set[str] = set()
    ended: Counter[str] = Counter()
    held: int | None = None  # requests made before the others were held back
    now = 0.0
    while len(made) < 12 or scheduler.num_live or held is not None:
        now += rng.random()
        event = rng.random()
        worker = rng.randrange(num_workers)
        if len(made) < 12 and event < 0.3:
            made.append(random_request(rng, requests, now))
            scheduler.add(made[-1])
        elif made and event < 0.34:
            victim = rng.choice(made).request_id
            aborted |= {victim} - ended.keys()
            scheduler.abort([victim, "unknown"])
        elif event < 0.38:
            cluster.lose(worker)
        elif event < 0.41 and held is None:
            held = len(made)
            scheduler.hold()
        if held is not None and scheduler.is_drained:
            waiting = scheduler.release()
            assert len(waiting) == scheduler.num_live, "all others have ended"
            live = [own for own in made[held:] if own.request_id not in aborted]
            assert [own for own in live if own not in waiting] == [], "none has started that came later"
            assert all(own.state.num_forwards == 0 for request in waiting for own in request.canvases)
            held = None
        cluster.fill(worker)
        ended.update(request.request_id for request in cluster.finish_one(worker))
    assert set(ended.values()) <= {1}
    assert ended.keys() == {request.request_id for request in made} - aborted
    for request in made:
        if request.request_id in ended:
            check_ended(request)
    for worker in range(num_workers):  # bursts that were still in flight bring nothing back to life
        while cluster.queues[worker]:
            assert cluster.finish_one(worker) == []
        assert scheduler.next_batch(worker) is None
    assert scheduler.num_held == 0


def lens(batch: StepBatch) -> list[Any]:
    return [state if isinstance(state, int) else state.sequence_len for state in batch.states]


def test_smaller_canvases_fill_room_that_the_next_one_does_not_fit_and_do_not_delay_it() -> None:
    scheduler, requests, worker = scheduler_of(100, 8), Requests(), SimulatedWorker()
    for prompt_len, canvas_len in ((60, 2), (80, 10), (10, 20)):
        scheduler.add(requests.make(prompt_len, canvas_len))
    assert [lens_run(scheduler, worker) for _ in range(3)] == [[62, 30], [62, 30], [90]]
    while scheduler.num_live:
        scheduler.update(worker.run(next_of(scheduler)))
    assert [batch.states for batch in worker.batches].count([]) == 0


def test_running_canvases_keep_their_place() -> None:
    scheduler, requests, worker = scheduler_of(100, 2), Requests(), SimulatedWorker()
    for _ in range(4):
        scheduler.add(requests.make(4, 6))
    for _ in range(6):
        scheduler.update(worker.run(next_of(scheduler)))
    assert scheduler.num_live == 2
    assert all(len(batch.states) == 2 for batch in worker.batches)


def test_an_urgent_request_displaces_the_last_of_the_running_ones_and_they_come_back() -> None:
    scheduler, requests, worker = scheduler_of(100, 2), Requests(), SimulatedWorker()
    for prompt_len in (10, 20):
        scheduler.add(requests.make(prompt_len, 4, priority=1))
    scheduler.update(worker.run(next_of(scheduler)))
    scheduler.add(requests.make(30, 2, priority=0, arrival_time=1.0))
    assert [lens_run(scheduler, worker) for _ in range(3)] == [[34 - 2, 14], [34 - 2, 14], [14, 24]]
    while scheduler.num_live:
        scheduler.update(worker.run(next_of(scheduler)))


def lens_run(scheduler: Scheduler, worker: SimulatedWorker) -> list[Any]:
    batch = next_of(scheduler)
    scheduler.update(worker.run(batch))
    return lens(batch)


def test_waiting_ages_so_that_urgent_arrivals_cannot_starve_anybody() -> None:
    scheduler, requests, worker = scheduler_of(100, 1, burst=8), Requests(), SimulatedWorker()
    patient = requests.make(50, 4, priority=2)
    scheduler.add(patient)
    for second in range(int(4 * AGEING_SECONDS)):  # one arrives a second, one is served a second
        scheduler.add(requests.make(10, 4, priority=0, arrival_time=float(second)))
        if patient in scheduler.update(worker.run(next_of(scheduler))):
            assert 2 * AGEING_SECONDS <= second <= 2 * AGEING_SECONDS + 1
            return
    pytest.fail("the patient request starved")


def test_bursts_grow_without_arrivals_and_shrink_when_a_request_arrives_or_waits() -> None:
    scheduler, requests, worker = scheduler_of(50, 8, burst=None), Requests(), SimulatedWorker()

    def steps() -> int:
        batch = next_of(scheduler)
        scheduler.update(worker.run(msgspec.structs.replace(batch, num_steps=1)))
        return batch.num_steps

    scheduler.add(requests.make(10, 30))
    assert [steps() for _ in range(5)] == [1, 2, 4, MAX_BURST, MAX_BURST]
    scheduler.add(requests.make(2, 2))
    assert [steps() for _ in range(2)] == [1, 2]
    scheduler.add(requests.make(10, 30))
    assert [steps() for _ in range(3)] == [1, 1, 1], "it does not fit and waits"


def test_the_step_time_is_kept_for_each_worker_and_counts_only_steps_taken() -> None:
    scheduler, requests = scheduler_of(1000, 1, burst=None), Requests()
    for _ in range(3):
        scheduler.add(requests.make(10, 300))
    workers = [SimulatedWorker(), SimulatedWorker()]
    expected = {0: [1, 5], 1: [1, 1]}
    for worker, step_seconds in ((0, 0.01), (1, 1.0)):
        for num_steps in expected[worker]:
            batch = next_of(scheduler, worker)
            assert batch.num_steps == num_steps, "others wait"
            result = workers[worker].run(msgspec.structs.replace(batch, num_steps=1))  # a canvas paused
            scheduler.update(msgspec.structs.replace(result, seconds=step_seconds))


@pytest.mark.parametrize(("num_rows", "expected"), [(310, 5), (200, 5), (10, 1)])
def test_a_step_of_shared_rows_does_not_promise_that_the_next_ones_are_as_fast(
    num_rows: int, expected: int
) -> None:
    scheduler, requests, worker = scheduler_of(1000, 1, burst=None), Requests(), SimulatedWorker()
    for _ in range(2):
        scheduler.add(requests.make(10, 300))
    result = worker.run(next_of(scheduler))
    scheduler.update(msgspec.structs.replace(result, seconds=0.01, num_rows=num_rows))
    assert next_of(scheduler).num_steps == expected, "50 ms, if a step of 310 rows takes 10"


def test_a_running_canvas_that_was_displaced_counts_as_waiting() -> None:
    scheduler, requests = scheduler_of(50, 8, burst=None), Requests()
    scheduler.add(requests.make(10, 30, priority=1))
    next_of(scheduler)
    scheduler.add(requests.make(10, 30, priority=0))
    urgent, again = next_of(scheduler), next_of(scheduler)
    assert (urgent.num_steps, again.num_steps) == (1, 2)


def test_a_second_burst_goes_on_with_the_canvases_of_the_first() -> None:
    scheduler, requests, worker = scheduler_of(100, 4, burst=2), Requests(), SimulatedWorker()
    for canvas_len in (2, 6, 6):
        scheduler.add(requests.make(10, canvas_len))
    first, second = next_of(scheduler), next_of(scheduler)
    assert (second.follows, second.states) == (first.burst_id, [0, 1, 2])
    scheduler.add(requests.make(5, 4))
    (ended,) = scheduler.update(worker.run(first))
    third = next_of(scheduler)
    assert (third.follows, lens(third)) == (second.burst_id, [1, 2, 9]), "the ended one is left out"
    assert scheduler.update(worker.run(second)) == []
    assert ended.canvases[0].state.num_forwards == 2, "the burst that followed changed nothing"


def test_an_urgent_request_goes_before_the_canvases_that_a_burst_would_go_on_with() -> None:
    scheduler, requests, worker = scheduler_of(100, 2), Requests(), SimulatedWorker()
    for prompt_len in (10, 20):
        scheduler.add(requests.make(prompt_len, 4, priority=1))
    first = next_of(scheduler)
    scheduler.add(requests.make(30, 4, priority=0))
    following = next_of(scheduler)
    assert lens(following) == [34, 0]
    scheduler.update(worker.run(first))
    scheduler.update(worker.run(following))
    assert lens(next_of(scheduler)) == [34, 14]


def test_a_canvas_in_flight_is_not_given_to_another_worker() -> None:
    scheduler, requests = scheduler_of(100, 4), Requests()
    scheduler.add(requests.make(10, 4))
    next_of(scheduler, worker=0)
    assert scheduler.next_batch(worker=1) is None
    scheduler.add(requests.make(20, 4))
    assert lens(next_of(scheduler, worker=1)) == [24]


def test_what_a_lost_worker_had_starts_again_from_the_copy_that_was_kept() -> None:
    scheduler, requests, worker = scheduler_of(100, 4, burst=2), Requests(), SimulatedWorker()
    request = requests.make(10, 6)
    scheduler.add(request)
    first, _ = next_of(scheduler), next_of(scheduler)
    scheduler.update(worker.run(first))
    next_of(scheduler)
    scheduler.lose(0)
    probe = next_of(scheduler, worker=1)
    assert probe.specs == [PROBE.spec], "it was alone: first something else must live"
    scheduler.update(SimulatedWorker().run(probe))
    again = next_of(scheduler, worker=1)
    assert again.follows is None
    assert again.states == [request.canvases[0].state]
    assert request.canvases[0].state.num_forwards == 2


def test_a_stop_string_ends_a_canvas_and_frees_its_place() -> None:
    scheduler, requests, worker = scheduler_of(100, 1, burst=8), Requests(), SimulatedWorker()
    request = requests.make(10, 12, block_length=4, stop_after=6)
    scheduler.add(request)
    assert scheduler.update(worker.run(next_of(scheduler))) == []
    assert request.canvases[0].state.num_forwards == 4, "a burst pauses at the end of a block"
    assert scheduler.update(worker.run(next_of(scheduler))) == [request]
    check_ended(request)
    assert request.canvases[0].text_stop == (6, "stop")


@pytest.mark.parametrize("remask", [None, "wino:t2=0.8"])
def test_messages_survive_the_wire(remask: str | None) -> None:
    scheduler, requests = scheduler_of(500, 8, burst=None), Requests()
    scheduler.add(requests.make(5, 40, n=2, remask=remask))
    first, following = next_of(scheduler), next_of(scheduler)
    for message in (first, following, SimulatedWorker().run(first)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_a_canvas_is_cut_into_blocks_of_which_the_last_may_be_shorter() -> None:
    canvas = Requests().make(3, 40).canvases[0]
    assert canvas.spec.block_lens == [32, 8]
    assert np.frombuffer(canvas.spec.slots, TOKEN).tolist() == list(range(3, 43))
    assert (canvas.spec.canvas_tokens(canvas.state) == MASK).all()
