"""The embedded diffusion model against its autoregressive twin: quality beside speed, over concurrencies.

    remask bench compare --output benchmarks/results/compare.json

Both have the same size, data and training tokens, and get the same problems. Each policy of the engine and
each way of serving the twin is measured in closed loops of several concurrencies, all in turn in every
repetition; a ratio is that of a policy's visible tokens a second to those of the faster way of serving the
twin in the same repetition. Quality is measured once a policy, on problems of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from remask import AsyncLLM, InvalidRequest, Unavailable
from remask.benchmarks.environment import Steadiness, environment_stamp
from remask.benchmarks.serving.autoregressive import ContinuousTarget, GenerateTarget
from remask.benchmarks.serving.load import closed_loop, figures
from remask.benchmarks.serving.targets import MAX_CONCURRENCY, EngineTarget, Target
from remask.benchmarks.throughput import find_model, spread
from remask.benchmarks.tiny.evaluate import TWIN_DIRECTORY
from remask.benchmarks.tiny.policies import COMPARED, POLICIES
from remask.benchmarks.utilization import Work, gemm_rate
from remask.benchmarks.workloads import Job, answers
from remask.llm import load_tokenizer
from remask.scheduler.errors import did_you_mean
from remask.workers.models.denoiser import load_denoiser

CONCURRENCIES = (1, 4, 16, 64)
QUALITY_SEED = 2**31 + 7
MAX_LEN = 128  # tokens of the longest problem and answer
RATE_PACKS = [(512, 256)] * 8
REPETITIONS = 9
STEADY_REQUESTS = (36, 2)  # at least so many in a loop, and so many for each that is under way

ON_A_CPU = (
    "On a CPU overheads decide about a model as small as this one (calls, Python, caches), not the roofline "
    "of arithmetic and bandwidth: these ratios say nothing about GPUs or larger models."
)

Progress = Callable[[str, int, int], None]  # what is measured, parts done and all


def check_arguments(
    policies: Sequence[str], concurrencies: Sequence[int], repetitions: int, num_problems: int
) -> None:
    """Raises InvalidRequest where one cannot be."""
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidRequest("policy", policy, f"unknown; {did_you_mean(policy, POLICIES)}")
    for concurrency in concurrencies:
        if not 1 <= concurrency <= MAX_CONCURRENCY:
            raise InvalidRequest("concurrency", concurrency, f"must be from 1 to {MAX_CONCURRENCY}")
    for name, value in (("repetitions", repetitions), ("num_problems", num_problems)):
        if value < 1:
            raise InvalidRequest(name, value, "must be at least 1")


def measure(
    *,
    policies: Sequence[str] = COMPARED,
    concurrencies: Sequence[int] = CONCURRENCIES,
    repetitions: int = REPETITIONS,
    num_problems: int = 256,
    progress: Progress = lambda *_: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """The report.

    Args:
        policies: names of `POLICIES`.
        concurrencies: requests under way.
        repetitions: of all loops.
        num_problems: that quality is measured on.
        progress: told before every part.
        keep: gets the report after every repetition, so that an interrupted run loses one.

    Raises:
        InvalidRequest: an argument cannot be.
    """
    check_arguments(policies, concurrencies, repetitions, num_problems)
    return asyncio.run(
        _Comparison(policies, concurrencies, repetitions, num_problems, progress, keep).report()
    )


class _Comparison:
    def __init__(
        self,
        policies: Sequence[str],
        concurrencies: Sequence[int],
        repetitions: int,
        num_problems: int,
        progress: Progress,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._policies, self._concurrencies = policies, sorted(set(concurrencies))
        self._repetitions, self._num_problems = repetitions, num_problems
        self._progress, self._keep = progress, keep
        self._environment = environment_stamp()
        self._runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._num_parts = self._done = 0

    async def report(self) -> dict[str, Any]:
        directory, _ = find_model("tiny")
        tokenizer = load_tokenizer(directory, required=True)
        model = load_denoiser(directory, dtype="float32")
        engine = await AsyncLLM.start(directory, dtype="float32")
        async with (
            EngineTarget(engine) as ours,
            GenerateTarget(TWIN_DIRECTORY, torch.float32, max_batch=max(self._concurrencies)) as static,
            ContinuousTarget(TWIN_DIRECTORY, torch.float32, max(self._concurrencies), MAX_LEN) as continuous,
        ):
            twins = (static, continuous)
            systems = {name: (ours, POLICIES[name]) for name in self._policies} | {
                twin.name: (twin, POLICIES["one token a step"]) for twin in twins
            }
            self._num_parts = (self._repetitions * len(self._concurrencies) + 1) * len(systems)
            quality = {}
            for name, (target, policy) in systems.items():
                jobs = answers(tokenizer, self._num_problems, policy, QUALITY_SEED)
                quality[name] = await self._quality(name, target, jobs)
            rate = max(gemm_rate(model.model, RATE_PACKS) for _ in range(2))
            steadiness = Steadiness()
            for _ in range(self._repetitions):
                for concurrency in self._concurrencies:
                    least, each = STEADY_REQUESTS
                    for name, (target, policy) in systems.items():
                        self._tell(f"{name}, {concurrency} at a time")
                        jobs = answers(tokenizer, max(least, each * concurrency), policy)
                        with Work() as work:
                            run = await closed_loop(target, jobs, concurrency)
                        found = _answered(name, figures(run)) | work.figures(run.duration, rate)
                        self._runs.setdefault((name, concurrency), []).append(found)
                steadiness.look()
                content = self._content(quality, [twin.name for twin in twins], steadiness)
                self._keep(content)
        self._progress("done", self._num_parts, self._num_parts)
        return content

    async def _quality(self, name: str, target: Target, jobs: Sequence[Job]) -> dict[str, Any]:
        self._tell(f"{name}, quality")
        found = _answered(name, figures(await closed_loop(target, jobs, max(self._concurrencies))))
        solved = found["solved"]
        error = (solved * (1 - solved) / len(jobs)) ** 0.5
        return {
            "solved": solved,
            "standard_error": round(error, 4),
            "problems": len(jobs),
            "tokens_per_forward": found.get("tokens_per_forward"),
        }

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._num_parts)
        self._done += 1

    def _content(
        self, quality: dict[str, Any], twins: Sequence[str], steadiness: Steadiness
    ) -> dict[str, Any]:
        results = []
        for (name, concurrency), runs in self._runs.items():
            rivals = [[run["output_throughput"] for run in self._runs[twin, concurrency]] for twin in twins]
            best = [max(pair) for pair in zip(*rivals, strict=True)]
            speeds = [run["output_throughput"] for run in runs]
            results.append(
                {
                    "system": name,
                    "max_concurrency": concurrency,
                    "completed": sum(run["completed"] for run in runs),
                    "failed": sum(run["failed"] for run in runs),
                    "output_throughput": spread(speeds),
                    "median_e2el_ms": spread([run["median_e2el_ms"] for run in runs]),
                    "p99_e2el_ms": spread([run["p99_e2el_ms"] for run in runs]),
                    "nfe": runs[0].get("nfe"),
                    "tokens_per_forward": runs[0].get("tokens_per_forward"),
                    **{
                        key: spread([run[key] for run in runs])
                        for key in ("rows_per_forward", "gemm_utilization")
                        if key in runs[0]
                    },
                    "times_as_fast_as_twin": spread([a / b for a, b in zip(speeds, best, strict=True)]),
                }
            )
        return {
            "benchmark": "compare",
            "environment": self._environment,
            "model": "tiny",
            "twin": "tiny/twin",
            "workload": "sudoku4x4, sudoku6x6 and addition3 in turn",
            "repetitions": len(steadiness.rates) - 1,
            "quality": quality,
            "results": results,
            "crossovers": crossovers(results, quality, self._policies),
            "notes": [*([] if torch.cuda.is_available() else [ON_A_CPU]), *steadiness.notes()],
        }


def _answered(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run. Raises Unavailable where nothing was answered."""
    if not found["completed"]:
        raise Unavailable(f"{name} answered nothing: {found['errors'][0]}")
    return found


def crossovers(
    results: Sequence[dict[str, Any]], quality: dict[str, Any], policies: Sequence[str]
) -> dict[str, str]:
    """For each policy from which of the measured concurrencies on the twin is the faster, in words."""
    told = {}
    for policy in policies:
        ratios = {
            result["max_concurrency"]: result["times_as_fast_as_twin"]["median"]
            for result in results
            if result["system"] == policy
        }
        ordered = sorted(ratios)
        wins = [c for i, c in enumerate(ordered) if all(ratios[later] < 1 for later in ordered[i:])]
        solved = f"{100 * quality[policy]['solved']:.0f} % solved"
        if not wins:
            told[policy] = f"not beaten by the twin at up to {ordered[-1]} requests at a time ({solved})"
        elif wins[0] == ordered[0]:
            told[policy] = f"slower than the twin from {wins[0]} request{'s' * (wins[0] > 1)} on ({solved})"
        else:
            before = ordered[ordered.index(wins[0]) - 1]
            told[policy] = f"slower than the twin from between {before} and {wins[0]} requests on ({solved})"
    return told


HEADER = ("decoder", "solved", "at a time", "tokens/s", "times the twin (min to max)", "median ms", "p99 ms")


def table_cells(result: dict[str, Any], quality: dict[str, Any]) -> list[str]:
    """A line of the table: one decoder at one concurrency."""
    ratio = result["times_as_fast_as_twin"]
    return [
        result["system"],
        f"{100 * quality[result['system']]['solved']:.1f} %",
        str(result["max_concurrency"]),
        f"{result['output_throughput']['median']:.0f}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{result['median_e2el_ms']['median']:.0f}",
        f"{result['p99_e2el_ms']['median']:.0f}",
    ]


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    table = Table(*HEADER, title=report["workload"])
    for result in ordered(report):
        table.add_row(*table_cells(result, report["quality"]))
    return table


def ordered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The results by decoder, then by concurrency."""
    systems = list(report["quality"])
    return sorted(report["results"], key=lambda r: (systems.index(r["system"]), r["max_concurrency"]))


def draw(report: dict[str, Any], path: Path) -> None:
    """Two charts: quality against visible tokens a second, and latency over concurrency."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for system, quality in report["quality"].items():
        own = [result for result in report["results"] if result["system"] == system]
        speeds = [result["output_throughput"]["median"] for result in own]
        style = {"marker": "o", "linestyle": "-" if system in POLICIES else "--", "label": system}
        left.plot(speeds, np.full(len(own), 100 * quality["solved"]), **style)
        for result, speed in zip(own, speeds, strict=True):
            place = (speed, 100 * quality["solved"])
            left.annotate(
                str(result["max_concurrency"]), place, textcoords="offset points", xytext=(0, 6), fontsize=8
            )
        latencies = [result["median_e2el_ms"]["median"] for result in own]
        right.plot([result["max_concurrency"] for result in own], latencies, **style)
    left.set(
        xscale="log", xlabel="visible tokens a second (labels: concurrency)", ylabel="problems solved, %"
    )
    right.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel="median latency, ms")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
