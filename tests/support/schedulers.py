"""Schedulers for tests, and their bursts."""

from remask.benchmarks.simulation import PROBE
from remask.scheduler.messages import StepBatch
from remask.scheduler.scheduler import Scheduler


def scheduler_of(max_num_rows: int = 999, max_num_seqs: int = 99, burst: int | None = 1) -> Scheduler:
    return Scheduler(max_num_rows=max_num_rows, max_num_seqs=max_num_seqs, burst=burst, probe=PROBE)


def next_of(scheduler: Scheduler, worker: int = 0) -> StepBatch:
    batch = scheduler.next_batch(worker)
    assert batch is not None
    return batch
