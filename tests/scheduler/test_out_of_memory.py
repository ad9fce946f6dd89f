"""Bursts that do not fit a worker's memory: smaller ones follow, nothing is lost, nothing runs twice."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import next_of

from remask.benchmarks.simulation import PROBE, Requests, SimulatedWorker
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.planning import REGROW_AFTER, Allowance, Budget, regrow, shrink
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler


class Small(SimulatedWorker):
    """A simulated worker whose memory holds so many rows."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.most_alone = capacity  # rows that a single canvas may have
        self.num_forwards = Counter[int]()  # by the canvas's seed
        self.failed: int | None = None

    def run(self, batch: StepBatch) -> StepResult:
        if batch.follows is not None and batch.follows == self.failed:
            return self._fails(batch, "skipped")
        assert not any(sent.finished for sent in batch.states if not isinstance(sent, int)), "it has ended"
        states = self.resolve(batch)
        live = [(spec, state) for spec, state in zip(batch.specs, states, strict=True) if not state.finished]
        num_rows = [spec.num_rows(state.sequence_len) for spec, state in live]
        if sum(num_rows) > self.capacity or max(num_rows, default=0) > self.most_alone:
            return self._fails(batch, "memory")
        result = super().run(batch)
        for spec, state, after in zip(batch.specs, states, result.states, strict=True):
            self.num_forwards[spec.seed] += after.num_forwards - state.num_forwards
        return result

    def _fails(self, batch: StepBatch, failure: str) -> StepResult:
        self.failed = batch.burst_id
        return failed(batch, failure)


def failed(batch: StepBatch, failure: str = "memory") -> StepResult:
    return StepResult(burst_id=batch.burst_id, states=[], num_rows=0, seconds=0.1, failure=failure)  # type: ignore[arg-type]


class Cluster:
    """Small workers with queues of bursts."""

    def __init__(self, scheduler: Scheduler, capacities: Sequence[int], depth: int) -> None:
        self.scheduler, self.depth = scheduler, depth
        self.workers = {number: Small(capacity) for number, capacity in enumerate(capacities)}
        self.queues = {number: deque[StepBatch]() for number in self.workers}
        self.ended: list[Request] = []
        self.num_results = Counter[str | None]()

    def turn(self, worker: int) -> None:
        queue = self.queues[worker]
        while len(queue) < self.depth and (batch := self.scheduler.next_batch(worker)) is not None:
            queue.append(batch)
            held = [{spec.seed for b in self.to_run(w) for spec in b.specs} for w in self.queues]
            assert sum(map(len, held)) == len(set().union(*held)), "a canvas is with one worker at a time"
        self.finish_one(worker)

    def to_run(self, worker: int) -> list[StepBatch]:
        """Bursts in a worker's queue that it will run; those that follow a failed burst are skipped."""
        failed, will_run = {self.workers[worker].failed}, list[StepBatch]()
        for batch in self.queues[worker]:
            if batch.follows is not None and batch.follows in failed:
                failed.add(batch.burst_id)
            else:
                will_run.append(batch)
        return will_run

    def finish_one(self, worker: int) -> None:
        if self.queues[worker]:
            result = self.workers[worker].run(self.queues[worker].popleft())
            self.num_results[result.failure] += 1
            self.ended += self.scheduler.update(result)

    def die(self, worker: int) -> None:
        self.ended += self.scheduler.lose(worker)
        capacity = self.workers.pop(worker).capacity
        del self.queues[worker]
        number = max(self.workers, default=worker) + 1 + worker
        self.workers[number], self.queues[number] = Small(capacity), deque()

    def drain(self) -> None:
        for worker in self.queues:
            while self.queues[worker]:
                self.finish_one(worker)


def rows_of(request: Request) -> int:
    return request.canvases[0].num_rows


def random_requests(rng: random.Random, requests: Requests) -> list[Request]:
    made = []
    for _ in range(10):
        canvas_len = rng.randint(1, 25)
        made.append(
            requests.make(
                rng.randint(1, 60),
                canvas_len,
                n=rng.randint(1, 3),
                block_length=rng.randint(1, canvas_len),
                remask=rng.choice([None, "wino"]),
                priority=rng.randint(-1, 1),
            )
        )
    return made


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), num_workers=st.integers(1, 3), depth=st.integers(1, 3))
def test_what_fits_alone_finishes_what_does_not_fails_and_nothing_runs_twice(
    seed: int, num_workers: int, depth: int
) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_rows=rng.choice([60, 500, 10**6]),
        max_num_seqs=rng.choice([2, 64]),
        burst=rng.choice([None, 1, 3]),
        probe=PROBE,
    )
    least, most = sorted(rng.randint(20, 150) for _ in range(2))
    cluster = Cluster(scheduler, [rng.randint(least, most) for _ in range(num_workers)], depth)
    waiting = random_requests(rng, Requests())
    made: list[Request] = []
    aborted: set[str] = set()
    for _ in range(20_000):
        if waiting and rng.random() < 0.3:
            made.append(waiting.pop())
            scheduler.add(made[-1])
        elif made and rng.random() < 0.02:
            victim = rng.choice(made).request_id
            aborted |= {victim} - {request.request_id for request in cluster.ended}
            scheduler.abort([victim])
        if rng.random() < 0.1:  # others use the device
            cluster.workers[rng.randrange(num_workers)].capacity = rng.randint(least, most)
        cluster.turn(rng.randrange(num_workers))
        if not (waiting or scheduler.num_live):
            break
    assert not scheduler.num_live, "it hangs"
    ended = [request.request_id for request in cluster.ended]
    assert len(set(ended)) == len(ended)
    assert set(ended) == {request.request_id for request in made} - aborted
    for request in cluster.ended:
        assert request.error is None or rows_of(request) > least
        assert request.error is not None or rows_of(request) <= most
        for canvas in request.canvases if request.error is None else ():
            assert canvas.state.finished
            num_run = sum(worker.num_forwards[canvas.spec.seed] for worker in cluster.workers.values())
            assert canvas.state.num_forwards == canvas.spec.canvas_len == num_run
    cluster.drain()
    assert all(scheduler.next_batch(worker) is None for worker in cluster.workers)
    assert scheduler.num_held == 0


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), num_workers=st.integers(1, 3), depth=st.integers(1, 3))
def test_workers_that_also_die_change_nothing_of_that(seed: int, num_workers: int, depth: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(max_num_rows=500, max_num_seqs=32, burst=2, probe=PROBE)
    capacity = rng.randint(20, 150)
    cluster = Cluster(scheduler, [capacity] * num_workers, depth)
    made = random_requests(rng, Requests())
    for request in made:
        scheduler.add(request)
    num_deaths = 0
    for _ in range(20_000):
        worker = rng.choice(list(cluster.workers))
        if num_deaths < 2 and rng.random() < 0.1:  # fewer deaths than put blame on a request
            num_deaths += 1
            cluster.die(worker)
        else:
            cluster.turn(worker)
        if not scheduler.num_live:
            break
    assert sorted(map(id, cluster.ended)) == sorted(map(id, made))
    for request in made:
        fits = rows_of(request) <= capacity
        assert fits == (request.error is None)
        assert not fits or all(canvas.state.finished for canvas in request.canvases)
    cluster.drain()
    assert all(scheduler.next_batch(worker) is None for worker in cluster.workers)
    assert scheduler.num_held == 0


def loaded(*lens: int, **fields: int) -> tuple[Scheduler, list[Request]]:
    """A scheduler with room for everything, and a request for each length."""
    scheduler, requests = Scheduler(max_num_rows=1000, max_num_seqs=100, burst=1, probe=PROBE), Requests()
    made = [requests.make(n - 5, 5, **fields) for n in lens]
    for request in made:
        scheduler.add(request)
    return scheduler, made


def test_a_burst_that_does_not_fit_comes_back_in_smaller_ones_that_do() -> None:
    scheduler, made = loaded(*[10] * 8)
    worker, sizes = Small(capacity=25), []
    while scheduler.num_live:
        batch = next_of(scheduler)
        sizes.append(len(batch.specs))
        scheduler.update(worker.run(batch))
    assert sizes == [8, 4, *[2] * 20]
    assert all(request.canvases[0].state.num_forwards == 5 for request in made)


def test_a_request_that_does_not_fit_alone_fails_with_all_its_samples_and_says_why() -> None:
    scheduler, made = loaded(10, 30, 10)
    sampled = Requests().make(25, 5, n=3, priority=-1)
    sampled.request_id = "sampled"
    for canvas in sampled.canvases:
        canvas.request_id = "sampled"
    scheduler.add(sampled)
    worker, ended = Small(capacity=20), []
    while scheduler.num_live:
        ended += scheduler.update(worker.run(next_of(scheduler)))
    assert [request.error is None for request in made] == [True, False, True]
    assert {request.request_id for request in ended if request.error} == {"sampled", made[1].request_id}
    assert sampled.error is not None
    assert "30 rows" in sampled.error
    assert "max_tokens" in sampled.error
    assert scheduler.next_batch() is None
    assert scheduler.num_held == 0


def test_what_follows_a_failed_burst_is_put_back_and_shrinks_nothing() -> None:
    scheduler, made = loaded(*[10] * 8)
    first, second = next_of(scheduler), next_of(scheduler)
    assert second.follows == first.burst_id
    assert scheduler.update(failed(first)) == []
    assert scheduler.next_batch() is None, "it would follow what will not run"
    assert scheduler.update(failed(second, "skipped")) == []
    again = next_of(scheduler)
    assert again.follows is None
    assert again.states == [request.canvases[0].state for request in made[:4]], "half of what failed"


def test_what_follows_nothing_runs_behind_a_failed_burst() -> None:
    scheduler, requests = Scheduler(max_num_rows=20, max_num_seqs=9, burst=1, probe=PROBE), Requests()
    scheduler.add(requests.make(15, 5, priority=1))
    first = next_of(scheduler)
    scheduler.add(requests.make(15, 5))
    second = next_of(scheduler)
    third = next_of(scheduler)
    assert (second.follows, third.follows) == (None, second.burst_id)
    assert scheduler.update(failed(first)) == []
    worker = SimulatedWorker()
    for batch in (second, third):
        scheduler.update(worker.run(batch))
    again = next_of(scheduler)
    assert again.specs == first.specs, "alone once more, with the memory that was freed"
    assert len(scheduler.update(failed(again))) == 1
    assert next_of(scheduler).specs == third.specs


def test_a_request_aborted_while_its_burst_fails_is_gone() -> None:
    scheduler, (request, *_) = loaded(10, 10)
    first, second = next_of(scheduler), next_of(scheduler)
    scheduler.abort([request.request_id])
    assert scheduler.update(failed(first)) == []
    assert scheduler.update(failed(second, "skipped")) == []
    assert scheduler.num_held == 1
    assert len(next_of(scheduler).specs) == 1
    assert request.error is None


def test_suspects_that_do_not_fit_run_apart_in_smaller_groups_and_nobody_is_blamed() -> None:
    scheduler, made = loaded(*[10] * 8)
    next_of(scheduler)
    scheduler.lose(0)
    groups, worker = [], Small(capacity=25)
    while len(groups) < 5:
        batch = next_of(scheduler, worker=1)
        groups.append([spec.seed for spec in batch.specs])
        assert scheduler.next_batch(1) is None, "it has nothing else"
        assert scheduler.update(worker.run(batch)) == []
    assert groups == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert not any(request.error for request in made)


def test_a_burst_that_could_not_run_is_not_suspected_when_its_worker_dies() -> None:
    scheduler, _ = loaded(*[10] * 4)
    first = next_of(scheduler)
    next_of(scheduler)
    scheduler.update(failed(first))
    scheduler.lose(0)
    worker, sizes = SimulatedWorker(), []
    for _ in range(3):
        batch = next_of(scheduler)
        sizes.append(len(batch.specs))
        scheduler.update(worker.run(batch))
    assert sizes == [2, 2, 4], "then all together: what was known of its memory went with it"


def test_a_worker_short_of_memory_makes_no_others_bursts_smaller() -> None:
    scheduler, _ = loaded(*[10] * 8)
    scheduler.update(failed(next_of(scheduler)))
    worker, sizes = SimulatedWorker(), []
    for _ in range(3):
        batch = next_of(scheduler, worker=1)
        sizes.append(len(batch.specs))
        scheduler.update(worker.run(batch))
    assert sizes == [4, 4, 8], "when those that did not fit have run again"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_request_that_does_not_fit_alone_makes_no_later_bursts_smaller(num_workers: int) -> None:
    """It explains why its bursts did not fit, on whichever worker."""
    scheduler, made = loaded(*[10] * 32, 100)
    cluster = Cluster(scheduler, [1000] * num_workers, depth=2)
    for worker in cluster.workers.values():
        worker.most_alone = 50
    for _ in range(100):
        for worker in range(num_workers):
            cluster.turn(worker)
    assert not scheduler.num_live
    assert [request.error is None for request in made] == [True] * 32 + [False]
    assert cluster.num_results["memory"] <= 5
    assert cluster.num_results[None] <= 10


def test_a_worker_gets_its_bursts_back_when_memory_was_short_for_a_while() -> None:
    scheduler, requests = Scheduler(max_num_rows=10**4, max_num_seqs=100, burst=1, probe=PROBE), Requests()
    for _ in range(8):
        scheduler.add(requests.make(5, 200))
    for _ in range(2):
        scheduler.update(failed(next_of(scheduler)))
    worker, sizes = SimulatedWorker(), []
    for _ in range(2 * REGROW_AFTER + 1):
        batch = next_of(scheduler)
        sizes.append(len(batch.specs))
        scheduler.update(worker.run(batch))
    assert sizes == [2] * REGROW_AFTER + [4] * REGROW_AFTER + [8]


@given(
    full=st.builds(Budget, st.integers(1, 10**6), st.integers(1, 1024)),
    bursts=st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 1024)), max_size=30),
)
def test_after_a_failure_a_worker_gets_at_most_half_and_at_least_one(
    full: Budget, bursts: list[tuple[int, int]]
) -> None:
    allowance = Allowance(full)
    for num_rows, num_seqs in bursts:
        before, allowance = allowance.budget, shrink(allowance, num_rows=num_rows, num_seqs=num_seqs)
        rows, seqs, _ = allowance.budget
        assert 1 <= rows <= min(before.max_num_rows, max(1, num_rows // 2))
        assert 1 <= seqs <= before.max_num_seqs
        assert seqs <= num_seqs // 2 or num_seqs == 1
        assert allowance.num_fitting == 0


@given(full=st.builds(Budget, st.integers(1, 500), st.integers(1, 64)), num_rows=st.integers(1, 500))
def test_a_worker_gets_everything_again_in_the_end(full: Budget, num_rows: int) -> None:
    allowance = shrink(Allowance(full), num_rows=num_rows, num_seqs=2)
    grown = [allowance.budget]
    for _ in range(REGROW_AFTER * 10):
        allowance = regrow(allowance, full)
        grown.append(allowance.budget)
    assert grown[REGROW_AFTER - 1] == grown[0]
    assert sorted(grown) == grown
    assert grown[-1] == full


@pytest.mark.parametrize("failure", ["memory", "error", "skipped"])
def test_a_failure_survives_the_wire(failure: str) -> None:
    scheduler, _ = loaded(10)
    result = failed(next_of(scheduler), failure)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result
