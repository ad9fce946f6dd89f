"""What Ray costs: one scheduler with workers on Ray against engines that run in their callers' processes.

    python -m remask.benchmarks.ray_workers --output benchmarks/results/ray_workers.json

The mixed requests of the throughput benchmark on 124 million random parameters, one thread a worker. *Two
workers* are compared with two independent engines side by side on the same cores, each with half of the
requests; *one worker* with one engine. Repetitions are interleaved and ratios taken within them. The *round
trip* of a burst of one step with 64 canvases of the tiny model is the time from handing it over to its
result, less what the worker computed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from remask import LLM
from remask.benchmarks.environment import Steadiness, environment_stamp
from remask.benchmarks.simulation import Requests
from remask.benchmarks.throughput import find_model, format_spread, spread, write_report
from remask.benchmarks.workloads import Job, workload
from remask.embedded import model_directory
from remask.scheduler.messages import StepBatch
from remask.workers.executors.base import Finished
from remask.workers.executors.ray_executor import RayExecutor
from remask.workers.startup.setup import WorkerSetup

MODEL = "llada-124m"
DTYPE = "float32"
NUM_CANVASES, ROUND_TRIPS = 64, 50


def make_llm(num_workers: int = 0, model: str = MODEL) -> LLM:
    """An engine in this process, or on this number of workers on Ray."""
    directory, load_format = find_model(model)
    on_ray: dict[str, Any] = {"distributed_executor_backend": "ray", "data_parallel_size": num_workers}
    return LLM(directory, dtype=DTYPE, load_format=load_format, **(on_ray if num_workers else {}))


def serve(llm: LLM, jobs: Sequence[Job]) -> float:
    """Seconds to serve the jobs together."""
    started = time.perf_counter()
    llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
    return time.perf_counter() - started


def _side(link: Connection, model: str) -> None:
    """Runs an engine in its own process: serves the jobs it receives and sends back the seconds."""
    torch.set_num_threads(1)
    with make_llm(model=model) as llm:
        link.send(None)
        while (jobs := link.recv()) is not None:
            link.send(serve(llm, jobs))


class SideBySide:
    """Independent engines on the same cores."""

    def __init__(self, count: int, model: str = MODEL) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self.links = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_side, args=(theirs, model), daemon=True) for _, theirs in pairs
        ]
        for process, link in zip(self.processes, self.links, strict=True):
            process.start()
            link.recv()

    def serve(self, jobs: Sequence[Job]) -> float:
        """Seconds until all of them have served their shares."""
        for i, link in enumerate(self.links):
            link.send(jobs[i :: len(self.links)])
        return max(link.recv() for link in self.links)

    def close(self) -> None:
        for process, link in zip(self.processes, self.links, strict=True):
            link.send(None)
            process.join()


def compare(num_workers: int, num_requests: int, repetitions: int, steadiness: Steadiness) -> dict[str, Any]:
    """Seconds of workers on Ray and of the same number of independent engines, and the speedup of Ray."""
    sides = SideBySide(num_workers)
    with make_llm(num_workers) as llm:
        jobs = workload("mixed", llm.tokenizer, llm.engine.intake.config, num_requests)
        for warm_up in (llm, sides):
            warm_up.serve(jobs[:2]) if isinstance(warm_up, SideBySide) else serve(warm_up, jobs[:2])
        pairs = []
        for _ in range(repetitions):
            pairs.append((serve(llm, jobs), sides.serve(jobs)))
            steadiness.look()
    sides.close()
    return {
        "workers": num_workers,
        "num_requests": num_requests,
        "seconds_ray": spread([ours for ours, _ in pairs]),
        "seconds_in_process": spread([theirs for _, theirs in pairs]),
        "ratio": spread([theirs / ours for ours, theirs in pairs]),
    }


def round_trip() -> dict[str, float]:
    """Milliseconds of a burst beyond its compute."""
    with model_directory("tiny") as directory:
        setup = WorkerSetup(
            model=str(directory.absolute()),
            dtype="float32",
            device="cpu",
            load_format="auto",
            batch_invariant=False,
            max_num_rows=1 << 20,
            attention_backend="auto",
            quantization=None,
            gpu_memory_utilization=0.9,
        )
        executor = RayExecutor(setup, num_workers=1, num_cpus=1, num_gpus=None, placement_group=None)
    requests = Requests()
    made = [requests.make(36, 40, unmask="schedule") for _ in range(NUM_CANVASES)]
    canvases = [canvas for request in made for canvas in request.canvases]
    batch = StepBatch(
        burst_id=0,
        num_steps=1,
        specs=[canvas.spec for canvas in canvases],
        states=[canvas.state for canvas in canvases],
    )
    beyond = []
    try:
        while not executor.workers:
            executor.next_event()
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            executor.submit(batch, executor.workers[0])
            while not isinstance(event := executor.next_event(), Finished):
                pass
            beyond.append(1000 * (time.perf_counter() - started - event.result.seconds))
    finally:
        executor.close()
    return spread(beyond)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.num_requests < 2 or args.repetitions < 1:
        parser.error("--num-requests must be at least 2, and --repetitions at least 1")
    torch.set_num_threads(1)
    environment, steadiness = environment_stamp(), Steadiness()
    report = {
        "environment": environment,
        "repetitions": args.repetitions,
        "round_trip_ms": round_trip(),
        "results": [compare(count, args.num_requests, args.repetitions, steadiness) for count in (1, 2)],
        "notes": steadiness.notes(),
    }
    table = Table("workers", "seconds on Ray", "in process", "Ray times as fast (min to max)")
    for result in report["results"]:
        table.add_row(*cells(result))
    Console().print(table)
    Console().print(f"round trip beyond compute: {report['round_trip_ms']} ms", *report["notes"], sep="\n")
    if args.output is not None:
        write_report(report, args.output)


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    ratio = result["ratio"]
    return [
        str(result["workers"]),
        f"{result['seconds_ray']['median']:.1f}",
        f"{result['seconds_in_process']['median']:.1f}",
        format_spread(ratio),
    ]


if __name__ == "__main__":
    main()
