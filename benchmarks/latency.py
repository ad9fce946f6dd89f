"""Latency of one batch: the engine and the published code's way of decoding, in turn.

    remask bench latency --batch-size 1 --output benchmarks/results/latency.json

All requests of a batch come at once, and the latency is that of the last answer. Keys are those of vLLM's
latency benchmark (`avg_latency`, `latencies`, `percentiles`, in seconds); the forwards it took stand beside
them. A ratio is taken within an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from remask import LLM, InvalidRequest
from remask.benchmarks.environment import Steadiness, environment_stamp
from remask.benchmarks.throughput import (
    Decoder,
    Dtype,
    check_arguments,
    engine_decoder,
    find_model,
    plain_loop_decoder,
    spread,
    static_batch_decoder,
)
from remask.benchmarks.utilization import gemm_rate
from remask.benchmarks.workloads import workload
from remask.workers.models.denoiser import load_denoiser

HEADER = ("decoder", "NFE", "seconds", "p90", "ms/step", "times as fast (min to max)")
PERCENTILES = (10, 25, 50, 75, 90, 99)


def measure(
    model: str, workload_name: str, batch_size: int, num_iters: int, num_iters_warmup: int, dtype: Dtype
) -> dict[str, Any]:
    """The report: environment, arguments and the figures of engine and baseline.

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
    with LLM(directory, dtype=dtype, load_format=load_format) as llm:
        denoiser = load_denoiser(directory, dtype=dtype, load_format=load_format)
        jobs = workload(workload_name, llm.tokenizer, denoiser.config, batch_size)
        baseline = "plain loop" if batch_size == 1 else "static batch"
        decoders = {
            "engine": Decoder(engine_decoder(llm)),
            baseline: Decoder((plain_loop_decoder if batch_size == 1 else static_batch_decoder)(denoiser)),
        }
        for decoder in decoders.values():
            for _ in range(num_iters_warmup):
                decoder.run(jobs)
        steadiness = Steadiness()
        for _ in range(num_iters):
            for decoder in decoders.values():
                decoder.repeat(jobs)
        steadiness.look()
        packs = decoders["engine"].work.sampled_packs()
        rates = {"engine": gemm_rate(denoiser.model, packs)}
    return {
        "benchmark": "latency",
        "environment": environment,
        "model": model,
        "dtype": dtype,
        "attention_backend": denoiser.attention.name,
        "workload": workload_name,
        "batch_size": batch_size,
        "notes": steadiness.notes(),
        "results": {
            name: _figures(decoder, decoders[baseline].seconds, rates.get(name))
            for name, decoder in decoders.items()
        },
    }


def _figures(decoder: Decoder, baseline: Sequence[float], rate: float | None) -> dict[str, Any]:
    seconds, num_steps = decoder.seconds, max(decoded.nfe for decoded in decoder.written)
    return {
        "avg_latency": round(float(np.mean(seconds)), 5),
        "latencies": [round(value, 5) for value in seconds],
        "percentiles": {str(p): round(float(np.percentile(seconds, p)), 5) for p in PERCENTILES},
        "nfe": sum(decoded.nfe for decoded in decoder.written),
        "ms_per_step": round(1000 * float(np.median(seconds)) / num_steps, 3),
        "rows_per_forward": round(decoder.work.rows_per_forward, 1),
        **({} if rate is None else decoder.work.figures(float(np.median(seconds)), rate)),
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
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
    ]
