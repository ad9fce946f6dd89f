"""Workers that die: which requests are suspected, cleared and blamed."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import scheduler_of

from remask.benchmarks.simulation import PROBE, Requests, SimulatedWorker
from remask.scheduler.blame import MAX_LONE_DEATHS, MAX_PROBE_DEATHS
from remask.scheduler.errors import Unavailable, WorkerDied
from remask.scheduler.messages import StepBatch
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler


class Mortals:
    """Simulated workers that die while running some requests, or at random; each is replaced at once."""

    def __init__(self, scheduler: Scheduler, num_workers: int, poison: set[int]) -> None:
        self.scheduler, self.poison = scheduler, poison  # seeds of the canvases that kill
        self.workers = {number: SimulatedWorker() for number in range(num_workers)}
        self.queues: dict[int, list[StepBatch]] = {number: [] for number in range(num_workers)}
        self.num_deaths, self.lone_deaths = 0, Counter[int]()
        self.ended: list[Request] = []

    def fill(self) -> None:
        for worker, queue in self.queues.items():
            while len(queue) < 2 and (batch := self.scheduler.next_batch(worker)) is not None:
                queue.append(batch)

    def turn(self, worker: int) -> None:
        """The worker runs its next burst, or dies of it."""
        if not self.queues[worker]:
            return
        seeds = {spec.seed for spec in self.queues[worker][0].specs}
        if seeds & self.poison:
            self.lone_deaths.update(seeds if len(seeds) == 1 else ())
            self.die(worker)
        else:
            batch = self.queues[worker].pop(0)
            self.ended += self.scheduler.update(self.workers[worker].run(batch))

    def die(self, worker: int) -> None:
        self.num_deaths += 1
        self.ended += self.scheduler.lose(worker)
        del self.workers[worker], self.queues[worker]
        number = max(self.workers, default=worker) + 1 + worker
        self.workers[number], self.queues[number] = SimulatedWorker(), []


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), num_workers=st.integers(1, 3), num_poisonous=st.integers(0, 3))
def test_requests_that_kill_are_found_and_all_others_finish(
    seed: int, num_workers: int, num_poisonous: int
) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_rows=rng.choice([50, 400]), max_num_seqs=rng.choice([2, 16]), burst=2, probe=PROBE
    )
    requests = Requests()
    made = [requests.make(10, rng.randint(1, 20), n=rng.randint(1, 2)) for _ in range(12)]
    poisonous = rng.sample(made, num_poisonous)
    mortals = Mortals(scheduler, num_workers, {c.spec.seed for r in poisonous for c in r.canvases})
    for request in made:
        scheduler.add(request)
    for _ in range(5000):
        if not scheduler.num_live:
            break
        mortals.fill()
        mortals.turn(rng.choice(list(mortals.queues)))
    assert len(mortals.ended) == len(made)
    assert {r.request_id for r in mortals.ended if r.error} == {r.request_id for r in poisonous}
    for request in made:
        if request not in poisonous:
            assert all(canvas.state.finished for canvas in request.canvases)
    for request in poisonous:
        deaths = max(mortals.lone_deaths[canvas.spec.seed] for canvas in request.canvases)
        assert deaths == MAX_LONE_DEATHS
    # Each death halves a group or counts against one canvas.
    num_canvases = sum(len(request.canvases) for request in poisonous)
    assert mortals.num_deaths <= num_canvases * (MAX_LONE_DEATHS + 5)
    while any(mortals.queues.values()):  # what is still in flight brings nothing back
        mortals.turn(next(worker for worker, queue in mortals.queues.items() if queue))
    assert scheduler.next_batch() is None
    assert scheduler.num_held == 0


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), num_workers=st.integers(1, 3))
def test_workers_that_die_at_random_fail_no_request(seed: int, num_workers: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(max_num_rows=100, max_num_seqs=8, burst=None, probe=PROBE)
    requests = Requests()
    made = [requests.make(10, rng.randint(1, 20)) for _ in range(8)]
    mortals = Mortals(scheduler, num_workers, set())
    for request in made:
        scheduler.add(request)
    for _ in range(5000):
        if not scheduler.num_live:
            break
        mortals.fill()
        worker = rng.choice(list(mortals.queues))
        if rng.random() < 0.2:
            mortals.die(worker)
        else:
            mortals.turn(worker)
    assert sorted(int(r.request_id) for r in mortals.ended) == list(range(8))
    if mortals.num_deaths < 3:
        assert not any(request.error for request in made)


def test_a_lone_request_is_not_blamed_while_nothing_else_lives() -> None:
    """In that case the machine may be the cause."""
    scheduler, requests = scheduler_of(), Requests()
    request = requests.make(5, 5)
    scheduler.add(request)
    probes: list[bool] = []

    def die_of_everything() -> None:
        for _ in range(20):
            batch = scheduler.next_batch()
            assert batch is not None
            probes.append(batch.specs == [PROBE.spec])
            assert scheduler.lose(0) == []

    with pytest.raises(Unavailable, match="8 workers in a row died of a canvas of one token"):
        die_of_everything()
    assert sum(probes) == MAX_PROBE_DEATHS == 8
    assert request.failure is None


def test_a_lone_request_is_blamed_if_a_probe_lives() -> None:
    scheduler, requests, worker = scheduler_of(), Requests(), SimulatedWorker()
    request = requests.make(5, 5)
    scheduler.add(request)
    ended: list[Request] = []
    for _ in range(20):
        batch = scheduler.next_batch()
        if batch is None:
            break
        if batch.specs == [PROBE.spec]:
            scheduler.update(worker.run(batch))
        else:
            ended += scheduler.lose(0)
    assert ended == [request]
    assert isinstance(request.failure, WorkerDied)
    assert scheduler.num_held == 0


def test_a_burst_that_comes_back_clears_its_canvases() -> None:
    scheduler, requests, worker = scheduler_of(), Requests(), SimulatedWorker()
    request = requests.make(5, 9)
    scheduler.add(request)
    for _ in range(8):  # it dies before every burst but always gets on
        scheduler.next_batch()
        assert scheduler.lose(0) == []
        for _ in range(2):  # the probe, and what gets on
            batch = scheduler.next_batch()
            assert batch is not None
            scheduler.update(worker.run(batch))
    assert request.error is None


def test_only_the_burst_that_ran_is_suspected() -> None:
    scheduler, requests = Scheduler(max_num_rows=30, max_num_seqs=2, burst=1, probe=PROBE), Requests()
    made = [requests.make(5, 5) for _ in range(4)]
    for request in made:
        scheduler.add(request)
    running, queued = scheduler.next_batch(), scheduler.next_batch()
    assert running is not None
    assert queued is not None
    scheduler.lose(0)
    suspected = {spec.seed for spec in running.specs}
    first, second, then = (scheduler.next_batch(worker) for worker in (1, 2, 3))
    assert first is not None
    assert second is not None
    assert then is not None
    assert [len(batch.specs) for batch in (first, second, then)] == [1, 1, 2]
    assert {batch.specs[0].seed for batch in (first, second)} == suspected


def test_a_worker_that_runs_a_suspect_has_nothing_else() -> None:
    """It may die of the next burst before the result of this one has left it."""
    scheduler, requests, worker = scheduler_of(), Requests(), SimulatedWorker()
    for _ in range(2):
        scheduler.add(requests.make(5, 5))
    busy = scheduler.next_batch(1)
    assert busy is not None
    for _ in range(3):
        scheduler.add(requests.make(5, 5))
    scheduler.next_batch(0)
    scheduler.lose(0)
    assert scheduler.next_batch(1) is None, "it has a burst in flight, and a suspect waits"
    apart = scheduler.next_batch(0)
    assert apart is not None
    assert len(apart.specs) == 1
    assert scheduler.next_batch(0) is None
    scheduler.update(worker.run(apart))
    assert scheduler.next_batch(0) is not None


@pytest.mark.parametrize("aborted_when", ["suspected", "in flight"])
def test_a_suspected_request_can_be_aborted(aborted_when: str) -> None:
    scheduler, requests, worker = scheduler_of(), Requests(), SimulatedWorker()
    made = [requests.make(5, 5) for _ in range(3)]
    for request in made:
        scheduler.add(request)
    scheduler.next_batch()
    scheduler.lose(0)
    if aborted_when == "suspected":
        scheduler.abort([made[0].request_id])
    while scheduler.num_live:
        batch = scheduler.next_batch()
        assert batch is not None
        if aborted_when == "in flight":
            scheduler.abort([made[0].request_id])
        scheduler.update(worker.run(batch))
    assert scheduler.next_batch() is None
    assert scheduler.num_held == 0


def test_others_that_are_idle_get_their_share() -> None:
    scheduler, requests, worker = scheduler_of(), Requests(), SimulatedWorker()
    for _ in range(9):
        scheduler.add(requests.make(5, 50))
    first = scheduler.next_batch(0, num_idle=1)
    second = scheduler.next_batch(1)
    assert first is not None
    assert second is not None
    assert (len(first.specs), len(second.specs)) == (5, 4)
    # One of them continues and leaves half of its canvases to a third worker, which has joined.
    onward = scheduler.next_batch(0, num_idle=1)
    assert onward is not None
    assert len(onward.specs) == 3
    scheduler.update(worker.run(first))
    third = scheduler.next_batch(2)
    assert third is not None
    assert len(third.specs) == 2
