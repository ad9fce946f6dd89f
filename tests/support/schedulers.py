"""Schedulers for tests of bursts that fail."""

from remask.benchmarks.simulation import PROBE
from remask.scheduler.scheduler import Scheduler


def scheduler_of() -> Scheduler:
    return Scheduler(max_num_rows=999, max_num_seqs=99, burst=1, probe=PROBE)
