"""Latency of one batch: the engine and the published code's way of decoding, in turn.

    remask bench latency --batch-size 1 --output benchmarks/results/latency.json

All requests of a batch arrive at once, and the latency of a batch is that of its last answer. Keys are those
of vLLM's latency benchmark (`avg_latency`, `latencies`, `percentiles`, in seconds); the number of forwards is
reported, too. A ratio is taken within an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from remask import LLM, InvalidRequest
from remask.benchmarks.environment import Steadiness, environment_stamp, unfinished
from remask.benchmarks.plain_canvas import Decoded
from remask.benchmarks.throughput import (
    NO_OPTIONS,
    Decoder,
    Dtype,
    Keep,
    check_arguments,
    engine_decoder,
    find_model,
    format_spread,
    plain_loop_decoder,
    spread,
    static_batch_decoder,
)
from remask.benchmarks.utilization import NOT_COUNTED
from remask.benchmarks.workloads import workload
from remask.workers.models.denoiser import load_denoiser

HEADER = ("decoder", "NFE", "seconds", "p90", "ms/step", "times as fast (min to max)")
PERCENTILES = (10, 25, 50, 75, 90, 99)


def measure(
    model: str,
    workload_name: str,
    batch_size: int,
    num_iters: int,
    num_iters_warmup: int,
    dtype: Dtype,
    keep: Keep = lambda _: None,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> dict[str, Any]:
    """The report: environment, arguments and the figures of engine and baseline; `keep` gets it after every
    iteration. `options` are more options of the engine.

    Raises:
        InvalidRequest: an argument cannot be, or the model cannot be loaded or does not fit the workload.
    """
    if batch_size < 1:
        raise InvalidRequest("batch_size", batch_size, "must be at least 1")
    if num_iters_warmup < 0:
        raise InvalidRequest("num_iters_warmup", num_iters_warmup, "must not be negative")
    check_arguments(batch_size, num_iters, [dtype])
    environment = environment_stamp()
    directory, load_format = find_model(model)
    with LLM(directory, dtype=dtype, load_format=load_format, **options) as llm:
        denoiser = load_denoiser(directory, dtype=dtype, load_format=load_format)
        jobs = workload(workload_name, llm.tokenizer, denoiser.config, batch_size)
        name = "plain loop" if batch_size == 1 else "static batch"
        engine = Decoder(engine_decoder(llm), denoiser)
        baseline = Decoder((plain_loop_decoder if batch_size == 1 else static_batch_decoder)(denoiser))
        for _ in range(num_iters_warmup):
            engine.run(jobs)
            baseline.run(jobs)
        steadiness = Steadiness()
        for done in range(1, num_iters + 1):
            engine.repeat(jobs)
            baseline.repeat(jobs)
            steadiness.look()
            counted = [] if engine.rates else [NOT_COUNTED]
            content = {
                "benchmark": "latency",
                "environment": environment,
                "model": model,
                "engine_options": dict(options),
                "dtype": dtype,
                "attention_backend": denoiser.attention.name,
                "workload": workload_name,
                "batch_size": batch_size,
                "notes": [*unfinished(done, num_iters, "iterations"), *counted, *steadiness.notes()],
                "results": {
                    label: _timed(decoder.seconds, baseline.seconds, decoder.written)
                    | decoder.figures(jobs, denoiser.config.eos_ids, llm.tokenizer)
                    for label, decoder in (("engine", engine), (name, baseline))
                },
            }
            keep(content)
    return content


def _timed(seconds: Sequence[float], baseline: Sequence[float], written: Sequence[Decoded]) -> dict[str, Any]:
    """Times of a decoder beside those of the baseline."""
    num_steps = max(decoded.nfe for decoded in written)
    return {
        "avg_latency": round(float(np.mean(seconds)), 5),
        "latencies": [round(value, 5) for value in seconds],
        "percentiles": {str(p): round(float(np.percentile(seconds, p)), 5) for p in PERCENTILES},
        "ms_per_step": round(1000 * float(np.median(seconds)) / num_steps, 3),
        "times_as_fast": spread([a / b for a, b in zip(baseline, seconds, strict=True)]),
    }


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    title = f"batch of {report['batch_size']} {report['workload']} requests, {report['model']}"
    table = Table(*HEADER, title=title)
    for name, result in report["results"].items():
        table.add_row(*cells(name, result))
    return table


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """A decoder's line of the table."""
    ratio = result["times_as_fast"]
    return [
        name,
        str(result["nfe"]),
        f"{result['percentiles']['50']:.3f}",
        f"{result['percentiles']['90']:.3f}",
        f"{result['ms_per_step']:.1f}",
        format_spread(ratio),
    ]
