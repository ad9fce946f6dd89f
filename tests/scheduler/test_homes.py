"""Canvases that reuse keys: they count with the rows of their next forward, and stay where their keys are."""

from __future__ import annotations

from typing import Any

from schedulers import next_of, scheduler_of

from remask.benchmarks.simulation import PROBE, Requests, SimulatedWorker
from remask.scheduler.scheduler import Scheduler


def test_a_canvas_stays_with_the_worker_that_holds_its_keys() -> None:
    scheduler, requests, workers = scheduler_of(1000, 8), Requests(), [SimulatedWorker() for _ in range(2)]
    scheduler.add(requests.make(10, 8, n=4, block_length=4, reuse="both"))
    for worker in (0, 1):
        batch = scheduler.next_batch(worker, num_idle=1 - worker)
        assert batch is not None
        assert len(batch.specs) == 2
        scheduler.update(workers[worker].run(batch))
    for _ in range(3):  # the rest of the block
        batches = {worker: next_of(scheduler, worker) for worker in (1, 0)}
        for worker, batch in batches.items():
            assert [spec.sample for spec in batch.specs] == [2 * worker, 2 * worker + 1]
            scheduler.update(workers[worker].run(batch))
    assert len(next_of(scheduler, 1).specs) == 4, "a block begins anywhere"


def test_an_idle_worker_takes_what_a_busy_one_cannot() -> None:
    scheduler, requests, worker = scheduler_of(1000, 2), Requests(), SimulatedWorker()
    scheduler.add(requests.make(10, 8, n=2, block_length=8, reuse="both"))
    scheduler.update(worker.run(next_of(scheduler, 0)))
    assert scheduler.next_batch(1) is None, "worker 0 is about to go on"
    scheduler.add(requests.make(10, 8, n=2, priority=-1))
    urgent, rest = next_of(scheduler, 0), next_of(scheduler, 1)
    assert [spec.reuse for batch in (urgent, rest) for spec in batch.specs] == [None, None, "both", "both"]


def test_a_canvas_counts_with_the_rows_of_its_next_forward() -> None:
    scheduler, requests, worker = scheduler_of(100, 8), Requests(), SimulatedWorker()
    scheduler.add(requests.make(50, 30, n=3, block_length=10, reuse="both"))
    sizes = []
    for _ in range(3):
        sizes.append(len((batch := next_of(scheduler)).specs))
        scheduler.update(worker.run(batch))
    assert sizes == [1, 2, 3], "80, 10 + 80 and 10 + 10 + 80 rows"


def test_what_waits_for_a_worker_that_dies_is_anyones() -> None:
    scheduler, requests, worker = scheduler_of(1000, 8), Requests(), SimulatedWorker()
    scheduler.add(requests.make(10, 8, block_length=8, reuse="prefix"))
    scheduler.update(worker.run(next_of(scheduler, 0)))
    assert scheduler.next_batch(1) is None
    scheduler.lose(0)
    assert len(next_of(scheduler, 1).specs) == 1


def test_a_burst_continues_a_canvas_that_reuses_keys_only_if_it_may() -> None:
    options: dict[str, Any] = {"max_num_rows": 99, "max_num_seqs": 8, "burst": 1, "probe": PROBE}
    for continues in (True, False):
        scheduler, requests = Scheduler(**options, continues_reuse=continues), Requests()
        scheduler.add(requests.make(10, 8, block_length=8))
        scheduler.add(requests.make(10, 8, block_length=8, reuse="both"))
        first, second = next_of(scheduler), next_of(scheduler)
        assert [spec.reuse for spec in first.specs] == [None, "both"]
        assert second.states == ([0, 1] if continues else [0])
