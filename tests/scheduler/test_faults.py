"""Workers that die: who is suspected, who is cleared, and who is to blame."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from remask.benchmarks.simulation import PROBE, Requests, SimulatedWorker
from remask.scheduler.blame import MAX_ACCUSED, MAX_LONE_DEATHS, MAX_PROBE_DEATHS
from remask.scheduler.canvas import NOT_NUMBERS
from remask.scheduler.errors import EngineDead, RequestFailed, Unavailable, WorkerDied
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler


def scheduler_of() -> Scheduler:
    return Scheduler(max_num_rows=999, max_num_seqs=99, burst=1, probe=PROBE)


class Mortals:
    """Simulated workers that die of some requests, and at random; each is replaced at once."""

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
    """Then it may be the machine."""
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
    scheduler, requests, worker = (
        Scheduler(max_num_rows=100, max_num_seqs=8, burst=1, probe=PROBE),
        Requests(),
        SimulatedWorker(),
    )
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
    scheduler, requests, worker = (
        Scheduler(max_num_rows=99, max_num_seqs=9, burst=1, probe=PROBE),
        Requests(),
        SimulatedWorker(),
    )
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
    scheduler, requests, worker = (
        Scheduler(max_num_rows=999, max_num_seqs=99, burst=1, probe=PROBE),
        Requests(),
        SimulatedWorker(),
    )
    for _ in range(9):
        scheduler.add(requests.make(5, 50))
    first = scheduler.next_batch(0, num_idle=1)
    second = scheduler.next_batch(1)
    assert first is not None
    assert second is not None
    assert (len(first.specs), len(second.specs)) == (5, 4)
    # One of them goes on and leaves half of what it has to a third that has come.
    onward = scheduler.next_batch(0, num_idle=1)
    assert onward is not None
    assert len(onward.specs) == 3
    scheduler.update(worker.run(first))
    third = scheduler.next_batch(2)
    assert third is not None
    assert len(third.specs) == 2


class Raising(SimulatedWorker):
    """Raises an error in bursts that hold one of some canvases, or in all."""

    def __init__(self, at_fault: set[int], *, always: bool = False) -> None:
        super().__init__()
        self.at_fault, self.always, self.failed = at_fault, always, -1
        self.num_raised = 0

    def run(self, batch: StepBatch) -> StepResult:
        def answer(failure: str, error: str | None = None) -> StepResult:
            self.failed = batch.burst_id
            fields = {"states": [], "num_rows": 0, "seconds": 0.0, "failure": failure, "error": error}
            return StepResult(burst_id=batch.burst_id, **fields)  # type: ignore[arg-type]

        if batch.follows is not None and batch.follows == self.failed:
            return answer("skipped")
        if self.always or {spec.seed for spec in batch.specs} & self.at_fault:
            self.num_raised += 1
            return answer("error", f"ValueError: burst {batch.burst_id}")
        return super().run(batch)


def test_requests_that_end_with_a_fault_do_not_count_as_queued_ones() -> None:
    """A fault ends a canvas that has left its burst and is not in the queue."""
    scheduler = Scheduler(max_num_rows=999, max_num_seqs=4, burst=1, probe=PROBE)
    requests, worker = Requests(), SimulatedWorker()
    for _ in range(12):
        scheduler.add(requests.make(10, 10))
    batch = scheduler.next_batch(0)
    assert batch is not None
    result = worker.run(batch)
    states = [replace(state, fault=NOT_NUMBERS) for state in result.states]
    assert len(scheduler.update(replace(result, states=states))) == 4
    shares = []
    while (batch := scheduler.next_batch(len(shares), num_idle=1)) is not None:
        shares.append(len(batch.specs))
    assert shares == [4, 2, 1, 1], "half of those that wait, for each of two workers"


def run_to_the_end(scheduler: Scheduler, worker: SimulatedWorker, depth: int = 2) -> list[Request]:
    queue: list[StepBatch] = []
    ended: list[Request] = []
    for _ in range(5000):
        while len(queue) < depth and (batch := scheduler.next_batch()) is not None:
            queue.append(batch)
        ended += scheduler.take_convicted()
        if not queue:
            return ended
        ended += scheduler.update(worker.run(queue.pop(0)))
    raise AssertionError("it never ends")


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), num_at_fault=st.integers(0, 12), depth=st.integers(1, 3))
def test_requests_that_raise_are_found_and_all_others_finish(
    seed: int, num_at_fault: int, depth: int
) -> None:
    """Also if many that raise one error stand side by side."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_rows=rng.choice([50, 400]), max_num_seqs=rng.choice([2, 16]), burst=2, probe=PROBE
    )
    requests = Requests()
    made = [requests.make(10, rng.randint(1, 20), n=rng.randint(1, 2)) for _ in range(14)]
    first = rng.randint(0, len(made) - num_at_fault)
    at_fault = made[first : first + num_at_fault] if seed % 2 else rng.sample(made, num_at_fault)
    for request in made:
        scheduler.add(request)
    seeds = {canvas.spec.seed for request in at_fault for canvas in request.canvases}
    ended = run_to_the_end(scheduler, Raising(seeds), depth)
    assert sorted(int(r.request_id) for r in ended) == list(range(14))
    for request in made:
        if request in at_fault:
            assert isinstance(request.failure, RequestFailed)
            assert "ValueError: burst" in str(request.failure)
        else:
            assert request.failure is None
            assert all(canvas.state.finished for canvas in request.canvases)
    assert scheduler.num_live == scheduler.num_held == 0


def test_a_canvas_that_another_worker_has_is_not_taken_back_with_what_was_skipped() -> None:
    scheduler, requests = scheduler_of(), Requests()
    for _ in range(2):
        scheduler.add(requests.make(5, 5))
    failed, follower = scheduler.next_batch(0), scheduler.next_batch(0)
    assert failed is not None
    assert follower is not None
    assert follower.follows == failed.burst_id
    fields = {"states": [], "num_rows": 0, "seconds": 0.0, "failure": "error", "error": "ValueError: no"}
    scheduler.update(StepResult(burst_id=failed.burst_id, **fields))
    elsewhere = scheduler.next_batch(1)
    assert elsewhere is not None
    scheduler.lose(0)
    batches = [elsewhere, *(scheduler.next_batch(worker) for worker in (2, 3, 4))]
    held = [spec.seed for batch in batches if batch is not None for spec in batch.specs]
    assert sorted(held) == [0, 1], "each is in one place"


@pytest.mark.parametrize("depth", [1, 2])
def test_many_requests_that_raise_cost_few_bursts_each(depth: int) -> None:
    """They are found among those that join a burst, not among all that it has."""
    rng = random.Random(0)
    scheduler, requests = (
        Scheduler(max_num_rows=2048, max_num_seqs=1024, burst=1, probe=PROBE),
        Requests(),
    )
    made = [requests.make(rng.randint(4, 32), rng.randint(8, 64)) for _ in range(250)]
    for request in made:
        scheduler.add(request)
    worker = Raising({request.canvases[0].spec.seed for request in rng.sample(made, 50)})
    ended = run_to_the_end(scheduler, worker, depth)
    assert sum(request.failure is not None for request in ended) == 50
    assert worker.num_raised <= 3.5 * 50


def test_if_everything_raises_the_engine_is_dead_and_nobody_is_blamed() -> None:
    scheduler, requests, worker = scheduler_of(), Requests(), Raising(set(), always=True)
    made = [requests.make(5, 5) for _ in range(2 * MAX_ACCUSED)]
    for request in made:
        scheduler.add(request)
    with pytest.raises(EngineDead, match="every burst fails with ValueError: burst"):
        run_to_the_end(scheduler, worker)
    assert scheduler.num_live == len(made)


def test_a_few_requests_that_raise_end_without_a_burst_that_comes_back() -> None:
    scheduler, requests = scheduler_of(), Requests()
    made = [requests.make(5, 5) for _ in range(MAX_ACCUSED - 1)]
    for request in made:
        scheduler.add(request)
    ended = run_to_the_end(scheduler, Raising(set(), always=True), depth=1)
    assert sorted(int(r.request_id) for r in ended) == list(range(len(made)))
    assert all(isinstance(request.failure, RequestFailed) for request in made)


def test_an_accused_request_that_is_aborted_is_forgotten() -> None:
    scheduler, requests = scheduler_of(), Requests()
    made = [requests.make(5, 5) for _ in range(2)]
    for request in made:
        scheduler.add(request)
    worker = Raising({0})
    for _ in range(2):  # together, then alone
        batch = scheduler.next_batch()
        assert batch is not None
        assert scheduler.update(worker.run(batch)) == []
    assert scheduler.num_live == 2
    scheduler.abort(["0"])
    assert scheduler.num_live == 1
    assert run_to_the_end(scheduler, worker) == [made[1]]
