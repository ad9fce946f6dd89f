"""What the scheduler costs: microseconds a canvas and step, over the number of live canvases.

    python -m remask.benchmarks.scheduling --output benchmarks/results/scheduling.json

The scheduler is driven without a model: only its own calls are timed, with the garbage collector on. A *step*
is one burst, cut and applied, of 64 canvases while the others wait, or of all live canvases. Canvases have 64
slots behind prompts of 128 tokens. The live counts are measured in turn, in several rounds, so that a slow
moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.simulation import PROBE, Requests
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.scheduler import Scheduler

LIVE = (64, 256, 1024, 4096, 16384)
NUM_SCHEDULED = 64
NUM_SLOTS = 64


def loaded(num_live: int, max_num_seqs: int) -> Scheduler:
    """A scheduler with this number of live canvases."""
    scheduler, requests = (
        Scheduler(max_num_rows=1 << 40, max_num_seqs=max_num_seqs, burst=1, probe=PROBE),
        Requests(),
    )
    for i in range(num_live):
        scheduler.add(requests.make(128, NUM_SLOTS, priority=i % 3, arrival_time=i * 0.01))
    return scheduler


def applied(batch: StepBatch) -> StepResult:
    """The result of a step that continues every canvas."""
    states = [
        msgspec.structs.replace(state, num_forwards=state.num_forwards + 1)
        for state in batch.states
        if not isinstance(state, int)
    ]
    return StepResult(burst_id=batch.burst_id, states=states, num_rows=0, seconds=0.0)


def seconds_a_step(scheduler: Scheduler, num_steps: int) -> float:
    """Mean seconds in the scheduler of one step."""
    total = 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        batch = scheduler.next_batch()
        total += time.perf_counter() - started
        assert batch is not None
        result = applied(batch)
        started = time.perf_counter()
        scheduler.update(result)
        total += time.perf_counter() - started
    return total / num_steps


def seconds_a_request(num_live: int) -> float:
    """Mean seconds of the scheduler to add and to drop a request, with this number of live requests."""
    scheduler, requests = loaded(num_live, NUM_SCHEDULED), Requests()
    requests.count, requests.num_canvases = num_live, num_live
    new = [requests.make(128, NUM_SLOTS) for _ in range(256)]
    started = time.perf_counter()
    for request in new:
        scheduler.add(request)
    scheduler.abort(request.request_id for request in new)
    return (time.perf_counter() - started) / len(new)


def measure(repetitions: int) -> list[dict[str, Any]]:
    """One row for each number of live canvases; medians over the repetitions."""
    found: dict[int, list[tuple[float, float, float]]] = {num_live: [] for num_live in LIVE}
    some = {num_live: loaded(num_live, NUM_SCHEDULED) for num_live in LIVE}
    every = {num_live: loaded(num_live, num_live) for num_live in LIVE}
    for _ in range(repetitions):
        for num_live in LIVE:
            found[num_live].append(
                (
                    seconds_a_step(some[num_live], 50),
                    seconds_a_step(every[num_live], max(2, 4096 // num_live)),
                    seconds_a_request(num_live),
                )
            )
    rows = []
    for num_live, timings in found.items():
        step, whole, request = (statistics.median(values) for values in zip(*timings, strict=True))
        rows.append(
            {
                "live": num_live,
                "us_per_scheduled": round(1e6 * step / NUM_SCHEDULED, 2),
                "us_per_scheduled_all": round(1e6 * whole / num_live, 2),
                "us_per_waiting": None,
                "us_per_request": round(1e6 * request, 2),
            }
        )
        if num_live > NUM_SCHEDULED:
            alone = statistics.median(timing[0] for timing in found[NUM_SCHEDULED])
            rows[-1]["us_per_waiting"] = round(1e6 * max(0.0, step - alone) / (num_live - NUM_SCHEDULED), 3)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    waiting = row["us_per_waiting"]
    return [
        str(row["live"]),
        f"{row['us_per_scheduled']:.1f}",
        f"{row['us_per_scheduled_all']:.1f}",
        "" if waiting is None else f"{waiting:.3f}",
        f"{row['us_per_request']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = {
        "environment": environment_stamp(),
        "scheduled": NUM_SCHEDULED,
        "repetitions": args.repetitions,
        "results": measure(args.repetitions),
    }
    table = Table(
        "live canvases",
        "64 scheduled: us a canvas",
        "all scheduled: us a canvas",
        "us a waiting one",
        "us a request",
    )
    for row in report["results"]:
        table.add_row(*cells(row))
    Console().print(table)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
