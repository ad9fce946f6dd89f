"""A load on one target: the engine, an autoregressive checkpoint, or any OpenAI-compatible server.

    remask bench serve-load --request-rate 8 --output load.json
    remask bench serve-load --target http://localhost:8000 --max-concurrency 16

With `--request-rate` requests arrive by a schedule. With `--max-concurrency` alone that many are in flight.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from remask import AsyncLLM, EngineOptions, InvalidRequest
from remask.benchmarks.environment import Steadiness, environment_stamp, unfinished
from remask.benchmarks.serving.load import (
    OnServed,
    Run,
    Served,
    arrival_times,
    closed_loop,
    figures,
    open_loop,
)
from remask.benchmarks.serving.peer import PeerTarget
from remask.benchmarks.serving.rivals import check_rival, open_rival
from remask.benchmarks.serving.targets import MAX_CONCURRENCY, EngineTarget, Target
from remask.benchmarks.throughput import Dtype, Keep, find_model
from remask.benchmarks.utilization import NOT_COUNTED, Work, gemm_rate
from remask.benchmarks.workloads import Job, workload
from remask.text import load_tokenizer
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.loading import read_config


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The load and its target.

    Attributes:
        target: "remask", one of `RIVALS`, or a server's URL.
        model: of the engine; its tokenizer also makes the requests of other targets.
        engine: more options of the engine.
        baseline: the autoregressive checkpoint of autoregressive targets; None: the embedded twin.
        served_model: what a server calls its model; None: its first.
        api_key: of a server; None: it asks for none. Reports do not hold it.
        peer, peer_python: another engine for the same model, see `PeerTarget`; in place of a target.
        max_concurrency: a closed loop; None: an open one.
        request_rate, burstiness: of the open loop; an infinite rate sends all at once, with an infinite
            burstiness arrivals are evenly spaced. JSON has no infinity: the report has null.
    """

    target: str = "remask"
    model: str = "tiny"
    engine: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    baseline: Path | None = None
    served_model: str | None = None
    api_key: str | None = None
    peer: str | None = None
    peer_python: Path | None = None
    workload: str = "tiny"
    num_prompts: int = 64
    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidRequest if an option is invalid."""
        check_rival("target", self.target, ["remask"])
        EngineOptions.parse(model=self.model, **self.engine)
        if (self.peer is None) != (self.peer_python is None):
            raise InvalidRequest("peer_python", self.peer_python, "goes with peer: give both or neither")
        if self.num_prompts < 1:
            raise InvalidRequest("num_prompts", self.num_prompts, "must be at least 1")
        if self.dtype not in get_args(Dtype):
            raise InvalidRequest("dtype", self.dtype, f"use one of {', '.join(get_args(Dtype))}")
        if self.max_concurrency is not None:
            if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
                fix = f"must be from 1 to {MAX_CONCURRENCY}"
                raise InvalidRequest("max_concurrency", self.max_concurrency, fix)
            if not math.isinf(self.request_rate):
                fix = "makes an open loop and max_concurrency a closed one; give one of them"
                raise InvalidRequest("request_rate", self.request_rate, fix)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(name, getattr(self, name), "must be above 0")


def measure(
    options: LoadOptions, on_answer: Callable[[], None] = lambda: None, keep: Keep = lambda _: None
) -> dict[str, Any]:
    """The report: environment, options, and the figures of `load.figures`.

    Args:
        options: the load.
        on_answer: called after every answer.
        keep: gets the report of the answered requests if an interrupt ends the measurement.

    Raises:
        InvalidRequest: an option, the model or the workload is invalid.
        Unavailable: the target is not installed, or the server does not answer.
    """
    options.check()
    return asyncio.run(_measure(options, on_answer, keep))


async def _measure(options: LoadOptions, on_answer: Callable[[], None], keep: Keep) -> dict[str, Any]:
    environment = environment_stamp()
    directory, load_format = find_model(options.model)
    tokenizer, config = load_tokenizer(directory, required=False), read_config(directory)[1]
    jobs = workload(options.workload, tokenizer, config, options.num_prompts)
    served: list[Served] = []
    interrupt: asyncio.CancelledError | None = None

    def came_back(one: Served) -> None:
        served.append(one)
        on_answer()

    async with await asyncio.to_thread(_target, options, directory, load_format, jobs) as target:
        await closed_loop(target, jobs[:1], 1)  # the first request's set-up is not measured
        steadiness, started = Steadiness(), time.perf_counter()
        with Work() as work:
            try:
                run = await _run(options, target, jobs, came_back)
            except asyncio.CancelledError as error:
                run, interrupt = Run(served, time.perf_counter() - started), error
    steadiness.look()
    counted, notes = {}, unfinished(len(run.served), options.num_prompts, "requests")
    if isinstance(target, EngineTarget):
        model = load_denoiser(directory, dtype=options.dtype, load_format=load_format)
        counted["attention_backend"] = model.attention.name
        if work.packs:
            counted |= work.figures(run.duration, gemm_rate(model.model, work.sampled_packs()))
        else:
            notes.append(NOT_COUNTED)
    content = {
        "benchmark": "serve-load",
        "environment": environment,
        "target": target.name,
        "model": options.model,
        "engine_options": dict(options.engine),
        "workload": options.workload,
        "num_prompts": options.num_prompts,
        "max_concurrency": options.max_concurrency,
        "request_rate": None if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": None if math.isinf(options.burstiness) else options.burstiness,
        **figures(run),
        **counted,
        "notes": [*notes, *steadiness.notes()],
    }
    if interrupt is not None:
        keep(content)
        raise interrupt
    return content


async def _run(options: LoadOptions, target: Target, jobs: Sequence[Job], on_served: OnServed) -> Run:
    if options.max_concurrency is not None:
        return await closed_loop(target, jobs, options.max_concurrency, on_served)
    arrivals = arrival_times(options.num_prompts, options.request_rate, options.burstiness, options.seed)
    return await open_loop(target, jobs, arrivals, on_served)


def _target(options: LoadOptions, directory: Path, load_format: str, jobs: Sequence[Job]) -> Target:
    max_requests = options.max_concurrency or options.num_prompts
    if options.peer is not None and options.peer_python is not None:
        return PeerTarget(options.peer, options.peer_python, directory, max_requests)
    if options.target == "remask":
        own = {"dtype": options.dtype, "load_format": load_format}
        return EngineTarget(AsyncLLM(directory, **options.engine, **own))
    return open_rival(
        options.target,
        jobs,
        max_requests,
        baseline=options.baseline,
        served_model=options.served_model,
        api_key=options.api_key,
        dtype=options.dtype,
    )


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    table = Table(
        "figure", "value", title=f"{report['num_prompts']} {report['workload']} requests, {report['target']}"
    )
    for name, value in report.items():
        if isinstance(value, int | float) and name not in ("num_prompts", "burstiness"):
            table.add_row(name, f"{value:,}")
    for error in report.get("errors", ()):
        table.add_row("error", error)
    return table
