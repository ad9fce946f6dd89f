"""The server on Ray Serve while a replica is killed and the others are drained, beside `remask serve`.

    python -m remask.benchmarks.serving.ray_serve --output benchmarks/results/ray_serve.json

64 requests are under way at all times, each with a seed of its own at temperature 1. The application has two
replicas in fp32 under `batch_invariant`, with one thread each. In a run with faults one replica is killed
(SIGKILL) after a quarter of the time, and the application is deployed again with one replica after 60 % of
it, so that Serve drains the ingress and both replicas while new ones start. Every response must have status
200 and the text that one engine writes undisturbed. `remask serve` runs the same load with one engine, on the
same cores. The client shares the cores with them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from remask import LLM
from remask.benchmarks.environment import Steadiness, environment_stamp
from remask.benchmarks.serving.server_cost import serving
from remask.benchmarks.throughput import write_report
from remask.benchmarks.tiny.tasks import PUZZLES

ENGINE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_rows": 1024, "batch_invariant": True}
CONCURRENCY, NUM_PROMPTS = 64, 256
KILLED_AT, DRAINED_AT = 0.25, 0.6  # of a run with faults
HEADER = ("server", "requests", "not answered", "other texts", "requests/s", "p50", "p99")


def replicas() -> list[int]:
    """Processes of the engines of the application."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::ServeReplica:remask:remask-engine"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def requests_of(count: int) -> list[dict[str, Any]]:
    """Bodies: sudokus of 6x6 cells in blocks of 12 slots, every other one with remasking."""
    texts, _ = PUZZLES["sudoku6x6"].held_out(np.random.default_rng(5), count)
    policies = ({"unmask": "threshold:0.9"}, {"remask": "wino:0.9"})
    shared = {"max_tokens": 36, "block_length": 12, "temperature": 1.0, "rank": "top"}
    return [
        {"prompt": text, **shared, **policies[place % 2], "seed": place} for place, text in enumerate(texts)
    ]


def load(url: str, bodies: list[dict[str, Any]], texts: list[str], seconds: float) -> dict[str, Any]:
    """A closed loop for some seconds: its figures."""
    ends, numbers = time.perf_counter() + seconds, itertools.count()
    latencies: list[float] = []
    failures: list[str] = []
    wrong: list[int] = []

    def caller(client: httpx.Client) -> None:
        while time.perf_counter() < ends:
            place = next(numbers) % len(bodies)
            started = time.perf_counter()
            try:
                response = client.post("/v1/completions", json=bodies[place])
            except httpx.HTTPError as error:
                failures.append(repr(error))
                continue
            latencies.append(time.perf_counter() - started)
            if response.status_code != 200:
                failures.append(response.text)
            elif response.json()["choices"][0]["text"] != texts[place]:
                wrong.append(place)

    started = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=url, timeout=300, limits=limits) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        for own in [pool.submit(caller, client) for _ in range(CONCURRENCY)]:
            own.result()
    duration = time.perf_counter() - started
    return {
        "seconds": round(duration, 1),
        "requests": len(latencies),
        "not_answered": len(failures),
        "failures": failures[:5],
        "other_texts": len(wrong),
        "requests_per_second": round(len(latencies) / duration, 2),
        "p50_seconds": round(statistics.median(latencies), 3),
        "p99_seconds": round(float(np.percentile(latencies, 99)), 3),
    }


def application(num_replicas: int) -> Any:
    """The application; replicas that leave have 60 seconds."""
    from remask.ray import build_app

    options = {"num_replicas": num_replicas, "graceful_shutdown_timeout_s": 60}
    return build_app({"model": "tiny", "engine_kwargs": ENGINE, "deployment_config": options})


def on_ray_serve(run: Callable[[], dict[str, Any]], seconds: float, *, faults: bool) -> dict[str, Any]:
    """A load on the application, with or without faults."""
    from ray import serve

    serve.run(application(2), name="remask", route_prefix="/")
    while len(replicas()) < 2:
        time.sleep(0.5)
    killer = threading.Timer(KILLED_AT * seconds, lambda: os.kill(replicas()[0], signal.SIGKILL))
    drainer = threading.Timer(
        DRAINED_AT * seconds,
        lambda: serve.run(application(1), name="remask", route_prefix="/", blocking=False),
    )
    if faults:
        killer.start()
        drainer.start()
    found = run()
    killer.cancel()
    drainer.cancel()
    return found


def free_port() -> int:
    """A port of the loopback that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(seconds: float, steadiness: Steadiness) -> list[dict[str, Any]]:
    """The loads, one after another."""
    from ray import serve

    bodies = requests_of(NUM_PROMPTS)
    with LLM("tiny", **ENGINE) as llm:
        prompts = [body["prompt"] for body in bodies]
        params = [{name: value for name, value in body.items() if name != "prompt"} for body in bodies]
        texts = [output.outputs[0].text or "" for output in llm.generate(prompts, params, use_tqdm=False)]

    def run(url: str) -> dict[str, Any]:
        steadiness.look()
        return load(url, bodies, texts, seconds)

    flags = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in ENGINE.items()
    ]
    with serving("tiny", *flags, OMP_NUM_THREADS="1") as (_, url):
        results = [{"server": "remask serve, one engine", **run(url)}]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"port": port})
    for name, faults in (("two replicas", False), ("one killed, then all drained", True)):
        found = on_ray_serve(lambda: run(f"http://127.0.0.1:{port}"), seconds, faults=faults)
        results.append({"server": f"Ray Serve, {name}", **found})
    serve.shutdown()
    ray.shutdown()
    return results


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        result["server"],
        f"{result['requests']:,} in {result['seconds']:.0f} s",
        str(result["not_answered"]),
        str(result["other_texts"]),
        f"{result['requests_per_second']:.1f}",
        f"{result['p50_seconds']:.2f} s",
        f"{result['p99_seconds']:.2f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of each load")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    environment, steadiness = environment_stamp(), Steadiness()
    results = measure(args.seconds, steadiness)
    report = {
        "environment": environment,
        "concurrency": CONCURRENCY,
        "results": results,
        "notes": steadiness.notes(),
    }
    table = Table(*HEADER)
    for result in results:
        table.add_row(*cells(result))
    Console().print(table, *report["notes"])
    if args.output is not None:
        write_report(report, args.output)


if __name__ == "__main__":
    main()
