"""Loads, and the figures of their requests.

A *closed loop* keeps a number of requests with the target: the next one is sent when one is answered. In an
*open loop* requests arrive on their own, by a Poisson process or in bursts (gaps from a gamma distribution,
whose shape is the burstiness; 1 is Poisson, less is burstier, infinity is evenly spaced), whether or not the
target keeps up.

Keys are those of vLLM's serving benchmark. Visible tokens are counted; if a target does not stream, the
first token comes with the last and the time per output token is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remask.benchmarks.serving.targets import Answer, Target
from remask.benchmarks.workloads import Job

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Served:
    """The outcome of a request.

    Attributes:
        latency: seconds from its arrival to its whole answer.
        answer: None if it failed.
        error: the reason.
    """

    job: Job
    latency: float
    answer: Answer | None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A load that was served; `duration` seconds from the first arrival to the last answer."""

    served: list[Served]
    duration: float


OnServed = Callable[[Served], None]  # called after each answer


async def closed_loop(
    target: Target, jobs: Sequence[Job], concurrency: int, on_served: OnServed = lambda _: None
) -> Run:
    """Keeps `concurrency` requests with the target."""
    waiting: Iterator[Job] = iter(jobs)
    served: list[Served] = []

    async def caller() -> None:
        for job in waiting:
            served.append(await _serve(target, job))
            on_served(served[-1])

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(min(concurrency, len(jobs)))))
    return Run(served, time.perf_counter() - started)


async def open_loop(
    target: Target, jobs: Sequence[Job], arrivals: Sequence[float], on_served: OnServed = lambda _: None
) -> Run:
    """Sends each request at its time, in seconds after the first."""
    started = time.perf_counter()

    async def caller(job: Job, arrival: float) -> Served:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        served = await _serve(target, job)
        on_served(served)
        return served

    pairs = zip(jobs, arrivals, strict=True)
    served = await asyncio.gather(*(caller(job, arrival) for job, arrival in pairs))
    return Run(served, time.perf_counter() - started)


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds after the first of `count` requests, `rate` a second in the mean; an infinite rate: at once."""
    if np.isinf(rate):
        return [0.0] * count
    if np.isinf(burstiness):
        return [place / rate for place in range(count)]
    gaps = np.random.default_rng(seed).gamma(burstiness, size=count - 1) / burstiness / rate
    return [0.0, *np.cumsum(gaps).tolist()]


async def _serve(target: Target, job: Job) -> Served:
    started = time.perf_counter()
    try:
        answer = await target.answer(job)
    except Exception as error:
        return Served(job, time.perf_counter() - started, None, f"{type(error).__name__}: {error}")
    return Served(job, time.perf_counter() - started, answer)


def figures(run: Run) -> dict[str, Any]:
    """The figures of a run, times in milliseconds."""
    done = [(served, served.answer) for served in run.served if served.answer is not None]
    num_inputs = sum(len(served.job.prompt) for served, _ in done)
    num_outputs = sum(answer.num_tokens for _, answer in done)
    result: dict[str, Any] = {
        "duration": round(run.duration, 4),
        "completed": len(done),
        "failed": len(run.served) - len(done),
        "total_input_tokens": num_inputs,
        "total_output_tokens": num_outputs,
        "request_throughput": round(len(done) / run.duration, 4),
        "output_throughput": round(num_outputs / run.duration, 2),
        "total_token_throughput": round((num_inputs + num_outputs) / run.duration, 2),
    }
    errors = sorted({served.error for served in run.served if served.error is not None})
    if errors:
        result["errors"] = errors[:5]
    if not done:
        return result
    result |= _times("e2el", [served.latency for served, _ in done])
    first = [
        served.latency if answer.first_token_seconds is None else answer.first_token_seconds
        for served, answer in done
    ]
    result |= _times("ttft", first)
    per_token = [
        (served.latency - answer.first_token_seconds) / (answer.num_tokens - 1)
        for served, answer in done
        if answer.first_token_seconds is not None and answer.num_tokens > 1
    ]
    if per_token:
        result |= _times("tpot", per_token)
    forwards = [answer.nfe for _, answer in done if answer.nfe is not None]
    if len(forwards) == len(done):
        result |= {"nfe": sum(forwards), "tokens_per_forward": round(num_outputs / max(1, sum(forwards)), 3)}
    scores = [
        served.job.puzzle.score(served.job.text or "", answer.text or "")
        for served, answer in done
        if served.job.puzzle is not None
    ]
    if len(scores) == len(done):
        result["solved"] = round(float(np.mean(scores)), 4)
    return result


def _times(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles of times, as vLLM names them."""
    ms = 1000 * np.asarray(seconds)
    return {
        f"mean_{name}_ms": round(float(ms.mean()), 3),
        f"median_{name}_ms": round(float(np.median(ms)), 3),
        f"std_{name}_ms": round(float(ms.std()), 3),
        **{f"p{p}_{name}_ms": round(float(np.percentile(ms, p)), 3) for p in PERCENTILES[1:]},
    }
