"""How many workers one engine feeds: the loop and the scheduler with workers that answer at once.

    python -m remask.benchmarks.scaling --output benchmarks/results/scaling.json

A worker here returns its canvases unchanged, so that all the time is the engine's: cutting bursts,
handing them over, applying results. Reported are bursts and canvas-steps a second (bursts of eight steps) for
1 to 64 workers with 256 live canvases each. The cost of encoding a burst for the wire is reported, too.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from remask import Engine, EngineOptions
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.simulation import Requests
from remask.benchmarks.throughput import spread, write_report
from remask.scheduler.canvas import CanvasState
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.executors.base import Event, Executor, Finished
from remask.workers.startup.start import WorkerFacts

NUM_WORKERS = (1, 4, 16, 64)
CANVASES_A_WORKER = 256
NUM_STEPS = 8
ENCODED_EVERY = 50  # bursts of which one is encoded, on the side


class InstantExecutor(Executor):
    """Workers that return what they get."""

    queue_depth = 2
    max_num_rows = 1 << 30

    def __init__(self, num_workers: int) -> None:
        self.facts = WorkerFacts(row_limit=None, attention_backend=None, overlaps=False, max_key_rows=0)
        self.workers = range(num_workers)
        self.num_bursts = self.num_canvases = 0
        self.encoding_ms: list[float] = []
        self._pending: deque[tuple[int, StepBatch]] = deque()
        self._last: dict[int, list[CanvasState]] = {}

    def submit(self, batch: StepBatch, worker: int) -> None:
        self._pending.append((worker, batch))

    def next_event(self, timeout: float | None = None) -> Event:
        worker, batch = self._pending.popleft()
        kept = self._last.get(worker, [])
        states = [kept[state] if isinstance(state, int) else state for state in batch.states]
        self._last[worker] = states
        self.num_bursts += 1
        self.num_canvases += len(states)
        result = StepResult(burst_id=batch.burst_id, states=states, num_rows=0, seconds=0.0)
        if self.num_bursts % ENCODED_EVERY == 0:
            started = time.perf_counter()
            msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=StepBatch)
            msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult)
            self.encoding_ms.append(1000 * (time.perf_counter() - started))
        return Finished(worker, result)

    def scale(self, num_workers: int) -> None:
        self.workers = range(num_workers)

    def close(self) -> None:
        self._pending.clear()


def measure(num_workers: int, seconds: float) -> dict[str, Any]:
    """Rates of one engine with `num_workers` workers."""
    executor, requests = InstantExecutor(num_workers), Requests()
    options = EngineOptions(model="tiny", max_num_seqs=CANVASES_A_WORKER, burst=NUM_STEPS)
    engine = Engine(options, executor)
    for _ in range(num_workers * CANVASES_A_WORKER):
        engine.add_request(requests.make(64, 64))
    for _ in range(4 * num_workers):  # every worker has kept canvases
        engine.step()
    executor.num_bursts = executor.num_canvases = 0
    executor.encoding_ms.clear()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        engine.step()
    elapsed -= sum(executor.encoding_ms) / 1000
    return {
        "workers": num_workers,
        "live": num_workers * CANVASES_A_WORKER,
        "bursts_per_second": round(executor.num_bursts / elapsed),
        "canvas_steps_per_second": round(executor.num_canvases * NUM_STEPS / elapsed),
        "us_per_canvas": round(1e6 * elapsed / executor.num_canvases, 2),
        "encoding_ms": spread(executor.encoding_ms),
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        str(result["workers"]),
        str(result["live"]),
        f"{result['bursts_per_second']:,}",
        f"{result['canvas_steps_per_second'] / 1e6:.2f}",
        f"{result['us_per_canvas']:.1f}",
        f"{result['encoding_ms']['median']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each size")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = [measure(num_workers, args.seconds) for num_workers in NUM_WORKERS]
    names = ("workers", "live", "bursts/s", "M canvas-steps/s", "us a canvas", "ms to encode a burst")
    table = Table(*names)
    for result in results:
        table.add_row(*cells(result))
    Console().print(table)
    if args.output is not None:
        write_report({"environment": environment_stamp(), "results": results}, args.output)


if __name__ == "__main__":
    main()
