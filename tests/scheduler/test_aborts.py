"""Requests that are aborted, in any state, leave nothing in the scheduler."""

from __future__ import annotations

import pytest
from schedulers import next_of, scheduler_of

from remask.benchmarks.simulation import Requests, SimulatedWorker
from remask.scheduler.messages import StepBatch


@pytest.mark.parametrize("progress", ["waiting", "in flight", "between bursts", "continued", "ended"])
def test_a_request_aborted_in_any_state_leaves_nothing(progress: str) -> None:
    scheduler, requests, worker = scheduler_of(100, 8, burst=2), Requests(), SimulatedWorker()
    request = requests.make(10, 5, n=2)
    scheduler.add(request)
    batches: list[StepBatch] = []
    if progress != "waiting":
        batches.append(next_of(scheduler))
    if progress == "continued":
        batches.append(next_of(scheduler))
    if progress in ("between bursts", "ended"):
        scheduler.update(worker.run(batches.pop()))
    while progress == "ended" and scheduler.num_live:
        scheduler.update(worker.run(next_of(scheduler)))
    scheduler.abort([request.request_id])
    assert scheduler.num_live == 0
    for batch in batches:
        assert scheduler.update(worker.run(batch)) == []
    assert scheduler.next_batch() is None
    assert scheduler.num_held == 0


def test_an_id_may_be_used_again_after_an_abort() -> None:
    scheduler, requests, worker = scheduler_of(100, 1, burst=8), Requests(), SimulatedWorker()
    first, second, third = (requests.make(10, 5) for _ in range(3))
    second.request_id = third.request_id = second.canvases[0].request_id = "same"
    third.canvases[0].request_id = "same"
    scheduler.add(first)
    scheduler.add(second)
    scheduler.abort(["same"])
    scheduler.add(third)
    ended = [request for _ in range(2) for request in scheduler.update(worker.run(next_of(scheduler)))]
    assert ended == [first, third]
    assert second.canvases[0].state.num_forwards == 0


def test_aborting_many_does_not_leave_them_in_the_queue() -> None:
    scheduler, requests = scheduler_of(100, 1, burst=1), Requests()
    made = [requests.make(4, 4) for _ in range(200)]
    for request in made:
        scheduler.add(request)
    scheduler.abort(request.request_id for request in made[1:])
    assert scheduler.num_held == 1
