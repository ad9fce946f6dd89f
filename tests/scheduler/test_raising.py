"""Bursts that raise: the requests at fault are found and end; and canvases that end with a fault."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from schedulers import scheduler_of

from remask.benchmarks.simulation import PROBE, Requests, SimulatedWorker
from remask.scheduler.blame import MAX_ACCUSED
from remask.scheduler.canvas import NOT_NUMBERS
from remask.scheduler.errors import EngineDead, RequestFailed
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler


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
    """The scheduler searches among the requests that joined the burst, not among all of its requests."""
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
