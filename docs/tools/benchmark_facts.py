"""Sentences and small tables that quote the committed measurements, for prose."""

from __future__ import annotations

import statistics

from benchmark_pages import Table, markdown, report

from remask.benchmarks import planner
from remask.benchmarks.throughput import format_spread


def solved() -> str:
    """What three policies do to 6x6 sudokus."""
    results = report("evaluation")["results"]
    found = {r["policy"]: r for r in results if r["task"] == "sudoku6x6"}
    one, threshold, wino = (
        f"{100 * found[name]['score']:.1f} % in {found[name]['nfe']:.1f} forwards"
        for name in ("one token a step", "threshold 0.9", "WINO 0.7/0.9")
    )
    return (
        f"On the tiny model's 6x6 sudokus one token a step solves {one}, `threshold:0.9` {threshold}, and "
        f"WINO 0.7/0.9 {wino}."
    )


def fp8_loss() -> str:
    """The largest loss in fp8."""
    worst = min(result["fp8_minus_bfloat16"] for result in report("fp8_quality")["results"])
    return (
        "One token a step loses little. Policies that decide several tokens at once lose up to "
        f"{-100 * worst:.1f} points, because confidences near a threshold move. What a model of billions of "
        "parameters loses is not measured."
    )


def round_trip() -> str:
    """How long a burst is on its way."""
    trip = report("ray_workers")["round_trip_ms"]["median"]
    return (
        f"A burst's way to a worker and back takes {trip:.1f} ms beyond its compute at 64 canvases. A worker "
        "holds the next burst while it runs one, so this time is hidden while the burst computes."
    )


def gpus_fed() -> str:
    """How many GPUs one engine feeds."""
    last = report("scaling")["results"][-1]
    schedule, encode = 256 * last["us_per_canvas"] / 1000, last["encoding_ms"]["median"]
    call = report("ray_workers")["round_trip_ms"]["median"]
    total = schedule + encode + call
    return (
        "A GPU whose step of 256 canvases takes 30 ms gets bursts of six steps, 5.6 a second. Each costs the "
        f"engine's process about {total:.1f} ms: {schedule:.1f} to schedule, {encode:.1f} to encode and "
        f"decode, {call:.1f} for Ray's call. So one engine feeds about {1000 / total / 5.6:.0f} of them. "
        "Larger models take longer steps and allow more. Beyond that, start another engine."
    )


def plan() -> str:
    """Knee and crossover of LLaDA-8B on an H200."""
    found = planner.report("llada-8b", "h200", planner.Load(128, 256, 32, 3.0), "bfloat16")
    return (
        "For LLaDA-8B on an H200, with three tokens a forward, prompts of 128 and canvases of 256 tokens, "
        f"the knee is {found['knee_rows']} rows and the crossover is at {found['crossover']} requests."
    )


def matrix_rate_of_bf16() -> str:
    """How fast the CPU of the throughput table multiplies in bf16."""
    results = report("throughput")["results"]
    bf16, fp32 = (
        statistics.median(results[f"engine, {dtype}"]["gemm_gflop_per_second"])
        for dtype in ("bfloat16", "float32")
    )
    return (
        f"The CPU of [Throughput](throughput.md) multiplies matrices {bf16 / fp32:.1f} times as fast "
        "in bf16 as in fp32."
    )


def crossovers() -> str:
    """From how many requests on the twin wins."""
    return "\n".join(f"- {policy}: {words}" for policy, words in report("compare")["crossovers"].items())


def num_sequences() -> str:
    """How many sequences the exactness benchmark draws."""
    return f"Each distance is that of {report('exactness')['count']:,} sequences."


def kernel_shares() -> str:
    """What a step of 8,192 rows on the H200 spends its time on."""
    kinds = {
        "matrix products": ("nvjet",),
        "attention": ("flash",),
        "gate": ("_silu_mul",),
        "head": ("_split", "_merge"),
        "norms and rotations": ("_rms_norm", "_rotate_halves"),
    }
    profile = report("h200")["stages"]["c"]["parts"]["profile"]["packed_8192"]
    rows = []
    for kind, words in kinds.items():
        own = sum(k["ms"] for k in profile["kernels"] if any(word in k["name"] for word in words))
        rows.append((kind, f"{100 * own / profile['step_ms']:.1f} %"))
    return markdown(Table(("kernels", "share of the step"), rows))


def kinds_of_requests() -> str:
    """How long a step of 2,048 rows takes on the H200, by kind of request."""
    found = report("h200")["stages"]["c"]["parts"]["kinds of requests"]["step_ms"]
    rows = [(f"`{kind}`", f"{ms:.0f}") for kind, ms in found.items()]
    return markdown(Table(("kind", "ms a step"), rows))


def performance() -> str:
    """The README's table of measurements."""
    speed = report("throughput")["results"]
    engine, static = speed["engine, float32"], speed["static batch, float32"]
    over_static = static["elapsed_time"] / engine["elapsed_time"]
    versus = report("compare")
    policy, twin = "threshold 0.9", "transformers generate"
    own = {r["max_concurrency"]: r for r in versus["results"] if r["system"] == policy}
    quality = [f"{100 * versus['quality'][name]['solved']:.0f} %" for name in (policy, twin)]
    gpu = report("h200")["figures"]
    setting = "16 mixed requests, LLaDA shape of 124M parameters, fp32, one CPU thread"
    rows = [
        (
            f"{setting}: against a plain loop",
            f"{format_spread(engine['times_as_fast'])} times as fast, equal tokens",
        ),
        ("the same against a static batch", f"{over_static:.1f} times as fast"),
        *(
            (
                f"`{policy.replace(' ', ':')}` against the autoregressive twin, {count} request(s) at a time",
                f"{format_spread(own[count]['times_as_fast'])} times the tokens/s; "
                f"{quality[0]} solved, twin {quality[1]}",
            )
            for count in (1, 64)
        ),
        (
            "64 mixed requests, LLaDA-8B shape, bf16, one H200: against static batches of the plain loop",
            f"{gpu['ratio_plain_mixed']:.2f} times as fast",
        ),
    ]
    return markdown(Table(("measured", "result (min to max)"), rows))
