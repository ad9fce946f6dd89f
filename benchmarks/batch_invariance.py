"""What `batch_invariant=True` costs: the same requests with it and without, in interleaved repetitions.

    python -m remask.benchmarks.batch_invariance --output benchmarks/results/batch_invariance.json

64 problems under three policies on the embedded model, and the 16 mixed requests of the throughput benchmark
on 124 million random parameters, on one CPU thread. A ratio is seconds with it over seconds without, within a
repetition.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from remask import LLM
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import find_model, format_spread, spread
from remask.benchmarks.workloads import Job, workload
from remask.workers.models.denoiser import load_denoiser

HEADER = ("model", "requests", "seconds", "with `batch_invariant`", "times as long (min to max)")
CASES = (("tiny", "tiny", 64), ("llada-124m", "mixed", 16))  # model, workload, requests


def seconds_of(llm: LLM, jobs: Sequence[Job]) -> float:
    """Seconds to serve the jobs together."""
    started = time.perf_counter()
    llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
    return time.perf_counter() - started


def measure(
    model: str, workload_name: str, count: int, repetitions: int, steadiness: Steadiness
) -> dict[str, Any]:
    """Seconds of both modes and their ratio."""
    directory, load_format = find_model(model)
    config = load_denoiser(directory, dtype="float32", load_format=load_format).config
    modes = [
        LLM(directory, dtype="float32", load_format=load_format, batch_invariant=is_invariant)
        for is_invariant in (False, True)
    ]
    jobs = workload(workload_name, modes[0].tokenizer, config, count)
    for llm in modes:
        seconds_of(llm, jobs[:2])  # warms up
    pairs = []
    for _ in range(repetitions):
        pairs.append([seconds_of(llm, jobs) for llm in modes])
        steadiness.look()
    return {
        "model": model,
        "workload": workload_name,
        "num_requests": count,
        "seconds": spread([plain for plain, _ in pairs]),
        "seconds_invariant": spread([invariant for _, invariant in pairs]),
        "ratio": spread([invariant / plain for plain, invariant in pairs]),
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A model's line of the table."""
    ratio = result["ratio"]
    return [
        result["model"],
        str(result["num_requests"]),
        f"{result['seconds']['median']:.1f}",
        f"{result['seconds_invariant']['median']:.1f}",
        format_spread(ratio),
    ]


def main() -> None:
    def every(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
        return [measure(*case, repetitions, steadiness) for case in CASES]

    repeated.run(__doc__, HEADER, cells, every)


if __name__ == "__main__":
    main()
