"""A diffusion model against an autoregressive one: quality beside speed, over concurrencies.

    remask bench compare --output benchmarks/results/compare.json
    remask bench compare --model DIR --baseline DIR --rival vllm --workload sharegpt:FILE.json

The default pair is the embedded model and its twin, which have the same size, data and training tokens, and
get the same problems. Each policy of the engine and each *rival*, a way of serving the autoregressive model,
is measured in closed loops of several concurrencies, all in turn in every repetition; a ratio is that of a
policy's visible tokens a second to those of the fastest rival in the same repetition. Quality is measured
once a policy, on problems of its own. Each policy may also reuse keys (", keys reused").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
from rich.table import Table

from remask import AsyncLLM, EngineOptions, InvalidRequest, Unavailable
from remask.benchmarks.environment import Steadiness, environment_stamp, unfinished
from remask.benchmarks.serving.load import closed_loop, figures
from remask.benchmarks.serving.rivals import check_rival, open_rival
from remask.benchmarks.serving.targets import MAX_CONCURRENCY, EngineTarget, Target
from remask.benchmarks.throughput import Dtype, Keep, find_model, format_spread, spread
from remask.benchmarks.tiny import policies as tiny
from remask.benchmarks.utilization import NOT_COUNTED, Work, gemm_rate
from remask.benchmarks.workloads import SEED, Job, answers, workload
from remask.scheduler.errors import did_you_mean
from remask.text import load_tokenizer
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.loading import read_config

REUSING = "{}, keys reused"
POLICIES = {
    **tiny.POLICIES,
    **{REUSING.format(n): {**own, "reuse": "both"} for n, own in tiny.POLICIES.items()},
}
COMPARED = (*tiny.COMPARED, REUSING.format("one token a step"), REUSING.format("threshold 0.9"))
CONCURRENCIES = (1, 4, 16, 64)
RIVALS = ("generate", "continuous")
QUALITY_SEED = 2**31 + 7
RATE_PACKS = [(512, 256)] * 8
REPETITIONS = 9
STEADY_REQUESTS = (36, 2)  # minimum in a loop: in all, and for each request in flight

ON_A_CPU = (
    "On a CPU overheads decide about models as small as the embedded ones (calls, Python, caches), not the "
    "roofline of arithmetic and bandwidth: the engine uses {} to {} % of the matrix rate, and these ratios "
    "say nothing about GPUs or larger models."
)

Progress = Callable[[str, int, int], None]  # name of the part, parts done, number of parts


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared.

    Attributes:
        model: the engine's.
        engine: more options of the engine.
        baseline: the autoregressive checkpoint; None: the embedded twin.
        rivals: names of ways to serve it, see `open_rival`.
        api_key: of servers among them; None: they ask for none. Reports do not hold it.
        dtype: of all weights that are loaded here.
        workload: "tiny" (problems whose answers are checked), or another one, which has no quality.
        policies: names of `POLICIES`.
        concurrencies: requests under way.
        repetitions: of all loops.
        num_problems: that quality is measured on.
    """

    model: str = "tiny"
    engine: Mapping[str, Any] = field(default_factory=dict)
    baseline: Path | None = None
    rivals: Sequence[str] = RIVALS
    api_key: str | None = None
    dtype: str = "float32"
    workload: str = "tiny"
    policies: Sequence[str] = COMPARED
    concurrencies: Sequence[int] = CONCURRENCIES
    repetitions: int = REPETITIONS
    num_problems: int = 256

    def check(self) -> None:
        """Raises InvalidRequest if an option is invalid."""
        EngineOptions.parse(model=self.model, **self.engine)
        for policy in self.policies:
            if policy not in POLICIES:
                raise InvalidRequest("policy", policy, f"unknown; {did_you_mean(policy, POLICIES)}")
        for rival in self.rivals:
            check_rival("rival", rival)
        if self.dtype not in get_args(Dtype):
            raise InvalidRequest("dtype", self.dtype, f"use one of {', '.join(get_args(Dtype))}")
        for concurrency in self.concurrencies:
            if not 1 <= concurrency <= MAX_CONCURRENCY:
                raise InvalidRequest("concurrency", concurrency, f"must be from 1 to {MAX_CONCURRENCY}")
        for name in ("repetitions", "num_problems"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "must be at least 1")


def measure(
    options: CompareOptions,
    progress: Progress = lambda *_: None,
    keep: Keep = lambda _: None,
) -> dict[str, Any]:
    """The report.

    Args:
        options: the systems, the load and the repetitions.
        progress: called before every part.
        keep: gets the report after every repetition, so that an interrupted run loses one.

    Raises:
        InvalidRequest: an option, a model or the workload is invalid.
        Unavailable: a rival is not installed, its server does not answer, or a system answers no request.
    """
    options.check()
    return asyncio.run(_Comparison(options, progress, keep).report())


class _Comparison:
    def __init__(self, options: CompareOptions, progress: Progress, keep: Keep) -> None:
        self._options, self._progress, self._keep = options, progress, keep
        self._concurrencies = sorted(set(options.concurrencies))
        self._environment = environment_stamp()
        directory, load_format = find_model(options.model)
        self._loading = {"dtype": options.dtype, "load_format": load_format}
        self._directory, self._config = directory, read_config(directory)[1]
        self._tokenizer = load_tokenizer(directory, required=options.workload == "tiny")
        self._runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._num_parts = self._done = 0

    async def report(self) -> dict[str, Any]:
        options, most = self._options, self._concurrencies[-1]
        jobs = self._jobs(most, POLICIES["one token a step"])
        memory_share = 0.9 / (1 + len(options.rivals))
        async with AsyncExitStack() as stack:
            rivals = [
                await stack.enter_async_context(
                    open_rival(
                        name,
                        jobs,
                        most,
                        baseline=options.baseline,
                        api_key=options.api_key,
                        dtype=options.dtype,
                        memory_share=memory_share,
                    )
                )
                for name in options.rivals
            ]
            self._look_at_the_model()
            engine = await AsyncLLM.start(
                self._directory,
                **{"gpu_memory_utilization": memory_share, **options.engine, **self._loading},
            )
            ours = await stack.enter_async_context(EngineTarget(engine))
            systems: dict[str, tuple[Target, dict[str, Any]]] = {
                **{name: (ours, POLICIES[name]) for name in options.policies},
                **{rival.name: (rival, POLICIES["one token a step"]) for rival in rivals},
            }
            return await self._measure(systems, [rival.name for rival in rivals])

    def _look_at_the_model(self) -> None:
        """Sets the model's matrix rate and attention backend, before the engine takes the memory."""
        denoiser = load_denoiser(self._directory, **self._loading)
        self._rate = max(gemm_rate(denoiser.model, RATE_PACKS) for _ in range(2))
        self._attention_backend = denoiser.attention.name

    async def _measure(
        self, systems: dict[str, tuple[Target, dict[str, Any]]], rivals: Sequence[str]
    ) -> dict[str, Any]:
        repetitions = self._options.repetitions
        self._num_parts = (repetitions * len(self._concurrencies) + 1) * len(systems)
        quality = {name: await self._quality(name, *system) for name, system in systems.items()}
        steadiness = Steadiness()
        for done in range(1, repetitions + 1):
            for concurrency in self._concurrencies:
                least, each = STEADY_REQUESTS
                for name, (target, policy) in systems.items():
                    self._tell(f"{name}, {concurrency} at a time")
                    jobs = self._jobs(max(least, each * concurrency), policy)
                    with Work() as work:
                        run = await closed_loop(target, jobs, concurrency)
                    found = _answered(name, figures(run)) | work.figures(run.duration, self._rate)
                    self._runs.setdefault((name, concurrency), []).append(found)
            steadiness.look()
            results = self._results(rivals)
            notes = [*unfinished(done, repetitions, "repetitions"), *steadiness.notes()]
            used = [
                round(100 * result["gemm_utilization"]["median"])
                for result in results
                if "gemm_utilization" in result
            ]
            notes.append(ON_A_CPU.format(min(used), max(used)) if used else NOT_COUNTED)
            content = {
                "benchmark": "compare",
                "environment": self._environment,
                "model": self._options.model,
                "engine_options": dict(self._options.engine),
                "baseline": str(self._options.baseline or "tiny/twin"),
                "dtype": self._options.dtype,
                "attention_backend": self._attention_backend,
                "workload": self._options.workload,
                "repetitions": done,
                "quality": quality,
                "results": results,
                "crossovers": crossovers(results, quality, self._options.policies),
                "notes": notes,
            }
            self._keep(content)
        self._progress("done", self._num_parts, self._num_parts)
        return content

    async def _quality(self, name: str, target: Target, policy: dict[str, Any]) -> dict[str, Any]:
        self._tell(f"{name}, quality")
        if self._options.workload != "tiny":
            return {}
        jobs = self._jobs(self._options.num_problems, policy, QUALITY_SEED)
        found = _answered(name, figures(await closed_loop(target, jobs, self._concurrencies[-1])))
        solved = found["solved"]
        error = (solved * (1 - solved) / len(jobs)) ** 0.5
        return {
            "solved": solved,
            "standard_error": round(error, 4),
            "problems": len(jobs),
            "tokens_per_forward": found.get("tokens_per_forward"),
        }

    def _jobs(self, count: int, policy: dict[str, Any], seed: int = SEED) -> list[Job]:
        """Requests under a policy. Their texts may end at an end-of-text token (`ignore_eos=False`)."""
        if self._options.workload == "tiny":
            return answers(self._tokenizer, count, policy, seed)
        changes = {"unmask": None, "remask": None, "reuse": None, **policy, "ignore_eos": False}
        return [
            replace(job, params=msgspec.structs.replace(job.params, **changes))
            for job in workload(self._options.workload, self._tokenizer, self._config, count)
        ]

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._num_parts)
        self._done += 1

    def _results(self, rivals: Sequence[str]) -> list[dict[str, Any]]:
        results = []
        for (name, concurrency), runs in self._runs.items():
            ours, *theirs = (
                [run["output_throughput"] for run in self._runs[system, concurrency]]
                for system in (name, *rivals)
            )
            best = [max(speeds) for speeds in zip(*theirs, strict=True)]
            results.append(
                {
                    "system": name,
                    "max_concurrency": concurrency,
                    "completed": sum(run["completed"] for run in runs),
                    "failed": sum(run["failed"] for run in runs),
                    "output_throughput": spread(ours),
                    "median_e2el_ms": spread([run["median_e2el_ms"] for run in runs]),
                    "p99_e2el_ms": spread([run["p99_e2el_ms"] for run in runs]),
                    "nfe": runs[0].get("nfe"),
                    "tokens_per_forward": runs[0].get("tokens_per_forward"),
                    **{
                        key: spread([run[key] for run in runs])
                        for key in ("rows_per_forward", "gemm_utilization")
                        if key in runs[0]
                    },
                    "times_as_fast": spread([a / b for a, b in zip(ours, best, strict=True)]),
                }
            )
        return results


def _answered(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run. Raises Unavailable if no request was answered."""
    if not found["completed"]:
        raise Unavailable(f"{name} answered nothing: {found['errors'][0]}")
    return found


def crossovers(
    results: Sequence[dict[str, Any]], quality: dict[str, Any], policies: Sequence[str]
) -> dict[str, str]:
    """For each policy, the measured concurrency from which on a rival is faster, in words."""
    rivals = {result["system"] for result in results} - set(policies)
    theirs = max((quality[rival].get("solved", 0.0) for rival in rivals), default=0.0)
    verdicts = {}
    for policy in policies:
        ratios = {
            result["max_concurrency"]: result["times_as_fast"]["median"]
            for result in results
            if result["system"] == policy
        }
        ordered = sorted(ratios)
        wins = [c for i, c in enumerate(ordered) if all(ratios[later] < 1 for later in ordered[i:])]
        if not wins:
            words = f"not beaten at up to {ordered[-1]} requests at a time"
        elif wins[0] == ordered[0]:
            words = f"beaten from {wins[0]} request{'s' * (wins[0] > 1)} on"
        else:
            words = f"beaten from between {ordered[ordered.index(wins[0]) - 1]} and {wins[0]} requests on"
        if "solved" in quality[policy]:
            words += f" ({100 * quality[policy]['solved']:.0f} % solved, the rival {100 * theirs:.0f} %)"
        verdicts[policy] = words
    return verdicts


HEADER = ("decoder", "solved", "at a time", "tokens/s", "times the rival (min to max)", "median ms", "p99 ms")


def table_cells(result: dict[str, Any], quality: dict[str, Any]) -> list[str]:
    """A line of the table: one decoder at one concurrency."""
    ratio, own = result["times_as_fast"], quality[result["system"]]
    return [
        result["system"],
        f"{100 * own['solved']:.1f} %" if own else "",
        str(result["max_concurrency"]),
        f"{result['output_throughput']['median']:.0f}",
        format_spread(ratio),
        f"{result['median_e2el_ms']['median']:.0f}",
        f"{result['p99_e2el_ms']['median']:.0f}",
    ]


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    title = f"{report['workload']} requests, {report['model']} and {report['baseline']}"
    table = Table(*HEADER, title=title)
    for result in ordered(report):
        table.add_row(*table_cells(result, report["quality"]))
    return table


def ordered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The results by decoder, then by concurrency."""
    systems = list(report["quality"])
    return sorted(report["results"], key=lambda r: (systems.index(r["system"]), r["max_concurrency"]))


def draw(report: dict[str, Any], path: Path) -> None:
    """Two charts: visible tokens a second with their quality (or, where it is not known, with the
    concurrency), and latency over concurrency."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    is_judged = all(report["quality"].values())
    for system, quality in report["quality"].items():
        own = [result for result in report["results"] if result["system"] == system]
        at_a_time = [result["max_concurrency"] for result in own]
        speeds = [result["output_throughput"]["median"] for result in own]
        latencies = [result["median_e2el_ms"]["median"] for result in own]
        heights = [100 * quality["solved"]] * len(own) if is_judged else at_a_time
        style = {"marker": "o", "linestyle": "-" if system in POLICIES else "--", "label": system}
        left.plot(speeds, heights, **style)
        if is_judged:
            places = zip(speeds, heights, strict=True)
            for i, (concurrency, place) in enumerate(zip(at_a_time, places, strict=True)):
                offset = (0, -14 if i % 2 else 6)  # above and below in turn: the last are near to each other
                left.annotate(str(concurrency), place, textcoords="offset points", xytext=offset, fontsize=8)
        right.plot(at_a_time, latencies, **style)
    left.set(xscale="log", xlabel="visible tokens a second" + is_judged * " (labels: requests at a time)")
    left.set_ylabel("problems solved, %" if is_judged else "requests at a time")
    left.margins(y=0.12)  # labels stay inside
    right.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel="median latency, ms")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
