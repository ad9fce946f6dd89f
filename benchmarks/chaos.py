"""Kills workers and removes nodes while requests run: no request may be lost and no result may change.

    python -m remask.benchmarks.chaos --output benchmarks/results/chaos.json

The Ray cluster has three nodes on this machine with one worker each. The same 300 requests, at temperature 1
with one seed per request and `batch_invariant=True`, run repeatedly. Every 15 seconds a random worker is
killed (SIGKILL); every third time a node is removed instead and a new one is added. Every token, number of
forwards and confidence must equal that of an undisturbed run in one process.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from rich.console import Console

from remask import LLM, RequestOutput
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.throughput import write_report
from remask.benchmarks.tiny.tasks import PUZZLES

NUM_NODES = 3
POLICIES: tuple[dict[str, Any], ...] = (
    {"unmask": "schedule:score=random"},
    {"unmask": "threshold:0.8", "remask": "wino:0.9"},
    {"remask": "saber"},
    {"unmask": "bernoulli:2.0", "remask": "low_prob:0.3"},
)


def requests_of(count: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Puzzles of all kinds in turn, under four policies."""
    import numpy as np

    rng, kinds = np.random.default_rng(0), list(PUZZLES.values())
    texts, params = [], []
    for i in range(count):
        puzzle = kinds[i % len(kinds)]
        (text,), _ = puzzle.held_out(rng, 1)
        texts.append(text)
        params.append(
            {"max_tokens": puzzle.answer_len + 4, "temperature": 1.0, "rank": "top", "seed": i}
            | POLICIES[i % len(POLICIES)]
        )
    return texts, params


def results_of(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    """Everything that must not change."""
    return [(o.error, s.token_ids, s.nfe, s.confidences, s.commit_steps) for o in outputs for s in o.outputs]


def worker_processes(session: str) -> list[int]:
    """Process ids of the remask workers of a Ray session, as far as they run on this machine.

    Other clusters on the machine may also have remask workers. A worker's session is known from the file that
    its output goes to.
    """
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            is_worker = Path(f"/proc/{entry}/cmdline").read_bytes().startswith(b"ray::RemaskWorker")
            if is_worker and f"/{session}/" in os.readlink(f"/proc/{entry}/fd/1"):
                found.append(int(entry))
        except OSError:
            continue
    return found


class Runs(threading.Thread):
    """Runs the requests again and again, and compares what comes back."""

    def __init__(self, llm: LLM, texts: list[str], params: list[dict[str, Any]], expected: list[Any]) -> None:
        super().__init__(daemon=True)
        self.llm, self.texts, self.params, self.expected = llm, texts, params, expected
        self.enough = threading.Event()
        self.count = self.changed = self.missing = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                found = results_of(self.llm.generate(self.texts, self.params, use_tqdm=False))
                self.count += 1
                self.missing += abs(len(self.expected) - len(found))
                self.changed += sum(a != b for a, b in zip(self.expected, found, strict=False))
        except BaseException as error:  # `measure` reports it
            self.error = error


def measure(count: int, seconds: float, pause: float) -> dict[str, Any]:
    """Runs the requests until the time is over; counts what was lost, repeated or changed."""
    texts, params = requests_of(count)
    options: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "batch_invariant": True,
        "max_num_rows": 1024,
    }
    with LLM("tiny", **options) as llm:
        undisturbed = results_of(llm.generate(texts, params, use_tqdm=False))
    cluster, rng = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), random.Random(0)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(NUM_NODES)]
    ray.init(address=cluster.address, log_to_driver=False)
    session = ray.get_runtime_context().get_session_name()
    kills = removals = 0
    try:
        with LLM("tiny", **options, distributed_executor_backend="ray", data_parallel_size=NUM_NODES) as llm:
            runs = Runs(llm, texts, params, undisturbed)
            runs.start()
            started = time.monotonic()
            # Here, because Ray wants nodes to be added in the main thread.
            while time.monotonic() - started + pause < seconds and runs.is_alive():
                time.sleep(pause)
                if (kills + removals) % 3 == 2:
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1))
                    removals += 1
                elif victims := worker_processes(session):
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    kills += 1
            runs.enough.set()
            runs.join()
            elapsed = time.monotonic() - started
            if runs.error is not None:
                raise runs.error
        left = [name for name in ray.util.list_named_actors() if name.startswith("RemaskWorker")]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {
        "requests": count,
        "runs": runs.count,
        "seconds": round(elapsed, 1),
        "killed_workers": kills,
        "removed_nodes": removals,
        "missing_or_repeated": runs.missing,
        "changed": runs.changed,
        "actors_left": len(left),
        "processes_left": len(worker_processes(session)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between two kills")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the workers have: other threads would sum in another order
    results = measure(args.requests, args.seconds, args.pause)
    Console().print(results)
    if args.output is not None:
        write_report({"environment": environment_stamp(), "results": results}, args.output)


if __name__ == "__main__":
    main()
