"""The stages of a run on a GPU and their parts; `run` says what each figure means."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from remask import LLM, SamplingParams
from remask.benchmarks import plain_loop, static_batch
from remask.benchmarks.gpu import timing
from remask.benchmarks.gpu.correctness import equal_tokens, golden_cases, outcome_of, start_gpu_tests
from remask.benchmarks.gpu.profiling import kernels_by_time
from remask.benchmarks.gpu.stage_report import Report, Sizes
from remask.benchmarks.throughput import find_model, spread
from remask.benchmarks.workloads import mixed
from remask.scheduler.canvas import Canvas
from remask.workers.burst.graphs import graphs_for
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.fp8 import quantize_layers
from remask.workers.startup.device import device_name
from remask.workers.startup.knee import find_knee
from remask.workers.worker import Worker

GRID_RESERVE_SECONDS = 5  # no point of the grid begins with less of the stage's time left
MAX_NUM_ROWS = 2048  # of the engines: the fewest with nearly the best rate
# Kinds of requests whose steps differ beside the model: statistics, draws, filters, copies and shadow rows.
KINDS: dict[str, dict[str, Any]] = {
    "threshold": {"unmask": "threshold:0.9"},
    "schedule": {"unmask": "schedule"},
    "margin": {"unmask": "schedule:score=margin"},
    "temperature": {"unmask": "threshold:0.9", "temperature": 1.0},
    "top_p": {"unmask": "threshold:0.9", "temperature": 1.0, "top_p": 0.95},
    "logit_bias": {"unmask": "threshold:0.9", "logit_bias": {5: 1.0}},
    "guidance": {"unmask": "threshold:0.9", "cfg_scale": 1.0},
    "wino": {"unmask": "capped_threshold:0.6", "remask": "wino:0.9"},
    "low_prob": {"unmask": "threshold:0.9", "remask": "low_prob"},
    "rcr": {"unmask": "schedule", "remask": "rcr"},
    "saber": {"remask": "saber"},
    "remdm": {"remask": "remdm"},
    "trace": {"unmask": "threshold:0.9", "trace": True},
}


def run(stage: str, path: Path, device_name: str, *, small: bool, seconds: float) -> None:
    """Runs a stage.

    Args:
        stage: a key of `STAGES`.
        path: JSON file to write.
        device_name: a torch device.
        small: whether to measure the small sizes.
        seconds: no part begins later than this after the start.
    """
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    STAGES[stage](device, Sizes(small), Report(path, seconds))


def stage_a(device: torch.device, sizes: Sizes, report: Report) -> None:
    """Whether what runs on the GPU is right."""
    report.plan("golden cases", "equal tokens", "gpu tests")
    # The tests run beside the other parts: neither is timed.
    tests = start_gpu_tests(report.path.with_suffix(".log")) if device.type == "cuda" else None
    report.part("golden cases", lambda: golden_cases(device, sizes))
    report.part("equal tokens", lambda: equal_tokens(device, sizes))
    report.part("gpu tests", lambda: outcome_of(tests, report))


def stage_b(device: torch.device, sizes: Sizes, report: Report) -> None:
    """Figures of single steps and single requests."""
    report.plan("machine", "load", "packed steps", "engine start", "one request", "plain loop", "grid")
    report.part("machine", lambda: machine(device, sizes))
    rates = report.content["parts"].get(
        "machine", {"gemm_tflops": torch.nan, "gigabytes_per_second": torch.nan}
    )
    directory, load_format = find_model(sizes.model)
    models: list[TransformerDenoiser] = []

    def load() -> dict[str, Any]:
        models.append(load_denoiser(directory, dtype="bfloat16", device=str(device), load_format=load_format))
        timing.wait(device)
        return {
            "model": sizes.model,
            "num_parameters": sum(parameter.numel() for parameter in models[0].model.parameters()),
            "attention_backend": models[0].attention.name,
            "kernels": models[0].kernels,
        }

    report.part("load", load)
    (model,) = models
    report.part("packed steps", lambda: packed_steps(model, sizes, rates["gemm_tflops"]))
    engines: list[LLM] = []

    def start() -> dict[str, Any]:
        engines.append(
            LLM(
                directory,
                dtype="bfloat16",
                device=str(device),
                load_format=load_format,
                max_num_rows=MAX_NUM_ROWS,
            )
        )
        return {}

    report.part("engine start", start)
    with engines.pop() as llm:
        report.part("one request", lambda: batch1(model, llm, sizes, rates["gigabytes_per_second"]))
        report.part("plain loop", lambda: plain_batch1(model, llm, sizes))
    report.part("grid", lambda: grid(model, sizes, report))


def stage_c(device: torch.device, sizes: Sizes, report: Report) -> None:
    """Kernels of single steps, steps of each kind of request, the mixed workload, reused keys, and fp8."""
    report.plan("mixed workload", "reused keys", "larger batches", "fp8", "kinds of requests", "profile")
    directory, load_format = find_model(sizes.model)
    model = load_denoiser(directory, dtype="bfloat16", device=str(device), load_format=load_format)
    with LLM(
        directory, dtype="bfloat16", device=str(device), load_format=load_format, max_num_rows=MAX_NUM_ROWS
    ) as llm:
        report.part("mixed workload", lambda: mixed_workload(model, llm, sizes, report))
        report.part("reused keys", lambda: reused_keys(model, llm, sizes, report))
    report.part("larger batches", lambda: larger_batches(model, directory, load_format, sizes))
    report.part("fp8", lambda: in_fp8(directory, load_format, device, sizes))
    report.part("kinds of requests", lambda: kinds_of_requests(model, sizes))
    report.part("profile", lambda: profile_steps(model, sizes))


STAGES = {"a": stage_a, "b": stage_b, "c": stage_c}


def machine(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rates of the machine."""
    rate = timing.gemm_flops_per_second(device, sizes.square)
    bandwidth = timing.bytes_per_second(device, sizes.copy_bytes)
    return {
        "device": device_name(device),
        "gemm_tflops": round(rate / 1e12, 3),
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
    }


def packed_steps(model: TransformerDenoiser, sizes: Sizes, gemm_tflops: float) -> dict[str, Any]:
    """Shares of the matrix rate."""
    result: dict[str, Any] = {}
    for key, num_rows in sizes.steps.items():
        taken, flops = packed_step(model, sizes, num_rows, repetitions=sizes.repetitions)
        share = flops / taken / (gemm_tflops * 1e12)
        result |= {f"step_share_{key}": round(share, 3), f"step_ms_{key}": round(1000 * taken, 3)}
    return result


def packed_canvases(model: TransformerDenoiser, sizes: Sizes, num_rows: int) -> list[Canvas]:
    """Equal canvases with `num_rows` rows together."""
    return timing.canvases(model.config, num_rows // sum(sizes.sequence), *sizes.sequence)


def packed_step(
    model: TransformerDenoiser, sizes: Sizes, num_rows: int, *, repetitions: int
) -> tuple[float, float]:
    """Median seconds of a step of `num_rows` rows, and the arithmetic that it needs."""
    num_steps, num_bursts = 3, 2
    asked = packed_canvases(model, sizes, num_rows)
    worker = Worker(model, graphs_for(model))
    times = [
        timing.step_seconds(worker, asked, model.device, num_steps=num_steps, num_bursts=num_bursts)
        for _ in range(repetitions)
    ]
    steps = range(num_steps, num_steps * (num_bursts + 1))
    return statistics.median(times), timing.needed_flops(model.config, asked, steps)


def single_canvas(model: TransformerDenoiser, sizes: Sizes) -> Canvas:
    """The canvas of one request."""
    (canvas,) = timing.canvases(model.config, 1, *sizes.single)
    return canvas


def batch1(model: TransformerDenoiser, llm: LLM, sizes: Sizes, gigabytes_per_second: float) -> dict[str, Any]:
    """One request: its step over the floor, and the host's share."""
    prompt_len, canvas_len = sizes.single
    asked = single_canvas(model, sizes)
    worker = Worker(model, graphs_for(model))
    num_steps = min(canvas_len // 2, 32)
    taken = statistics.median(
        timing.step_seconds(worker, [asked], model.device, num_steps=num_steps, num_bursts=1)
        for _ in range(sizes.repetitions)
    )
    floors = timing.floor_seconds(
        model, prompt_len + canvas_len, asked.spec.block_length // 2, gigabytes_per_second * 1e9
    )
    params = SamplingParams(max_tokens=canvas_len, block_length=timing.BLOCK_LEN, unmask="schedule", seed=0)
    prompt = asked.state.token_array()[:prompt_len].tolist()
    walls = []
    for _ in range(sizes.repetitions):
        started = time.perf_counter()
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        walls.append((time.perf_counter() - started) / output.outputs[0].nfe)
    wall = statistics.median(walls[1:] or walls)  # graphs are captured in the first
    return {
        "batch1_ms": round(1000 * taken, 3),
        "batch1_floor_ms": {name: round(1000 * value, 3) for name, value in floors.items()},
        "batch1_over_floor": round(taken / max(floors.values()), 3),
        "batch1_engine_ms": round(1000 * wall, 3),
        "batch1_host_share": round(1 - taken / wall, 3),
    }


def fixed_forwards(sizes: Sizes, reuse: Literal["both"] | None = None) -> SamplingParams:
    """Parameters of the one request, at a number of forwards that does not depend on the model's answers."""
    return SamplingParams(
        max_tokens=sizes.single[1],
        block_length=timing.BLOCK_LEN,
        unmask=f"schedule:{sizes.single_steps}",
        seed=0,
        ignore_eos=True,
        reuse=reuse,
    )


def plain_batch1(model: TransformerDenoiser, llm: LLM, sizes: Sizes) -> dict[str, Any]:
    """One request through the engine and through the plain loop, at equal forwards."""
    prompt = single_canvas(model, sizes).state.token_array()[: sizes.single[0]].tolist()
    params = fixed_forwards(sizes)
    ratios = interleaved(
        sizes.repetitions,
        lambda: llm.generate([prompt], params, use_tqdm=False),
        lambda: plain_loop.decode(model, prompt, params),
    )[0]
    return {"ratio_plain_batch1": statistics.median(ratios), "plain_batch1": spread(ratios)}


def grid(model: TransformerDenoiser, sizes: Sizes, report: Report) -> dict[str, Any]:
    """Time of a step over rows and requests, and the knee: the fewest rows with nearly the best rate."""
    worker, points = Worker(model, graphs_for(model)), []
    for num_rows, num_requests in itertools.product(sizes.rows, sizes.requests):
        length = num_rows // num_requests
        if not 16 <= length <= model.config.max_len or report.seconds_left() < GRID_RESERVE_SECONDS:
            continue
        asked = timing.canvases(model.config, num_requests, length - length // 2, length // 2)
        taken = timing.step_seconds(worker, asked, model.device, num_steps=2, num_bursts=2)
        points.append({"rows": num_rows, "requests": num_requests, "step_ms": round(1000 * taken, 3)})
    best = {
        rows: max(rows / p["step_ms"] for p in points if p["rows"] == rows)
        for rows in dict.fromkeys(p["rows"] for p in points)
    }
    return {"points": points, "knee_rows": find_knee(list(best.items()))}


def in_fp8(directory: Path, load_format: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Packed steps, then the same with the weights in fp8."""
    model = load_denoiser(directory, dtype="bfloat16", device=str(device), load_format=load_format)

    def times() -> dict[int, float]:
        return {key: packed_step(model, sizes, rows, repetitions=1)[0] for key, rows in sizes.steps.items()}

    before = times()
    quantize_layers(model.model.blocks)
    after = times()
    ratios = {key: round(before[key] / after[key], 3) for key in before}
    return {
        "fp8_over_bf16": ratios[8192],
        "fp8_over_bf16_by_rows": ratios,
        "profile": profile_step(model, packed_canvases(model, sizes, sizes.steps[8192])),
    }


def profile_steps(model: TransformerDenoiser, sizes: Sizes) -> dict[str, Any]:
    """Kernels of a packed step, which runs kernel by kernel, and of one request's, which runs as a graph."""
    return {
        "packed_8192": profile_step(model, packed_canvases(model, sizes, sizes.steps[8192])),
        "batch1": profile_step(model, [single_canvas(model, sizes)]),
    }


def profile_step(model: TransformerDenoiser, asked: list[Canvas]) -> dict[str, Any]:
    """Kernels of a step of some canvases."""
    if model.device.type != "cuda":
        return {"outcome": "not run: no GPU"}
    worker = Worker(model, graphs_for(model))

    def steps() -> float:
        return timing.step_seconds(worker, asked, model.device, num_steps=4, num_bursts=1)

    steps()
    # A call takes four bursts of 4 steps, the last of which is timed.
    return {"step_ms": round(1000 * steps(), 3), **kernels_by_time(steps, num_steps=16)}


def kinds_of_requests(model: TransformerDenoiser, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds of the first steps of requests of one kind, which share a step."""
    prompt_len, canvas_len = sizes.sequence
    result = {}
    for kind, fields in KINDS.items():
        params = SamplingParams(max_tokens=canvas_len, block_length=timing.BLOCK_LEN, **fields)
        asked = timing.canvases(model.config, sizes.num_kinds, prompt_len, canvas_len, params)
        worker = Worker(model, graphs_for(model))
        taken = timing.step_seconds(worker, asked, model.device, num_steps=2, num_bursts=1)
        result[kind] = round(1000 * taken, 3)
    return {"step_ms": result, "rows": sizes.num_kinds * sum(sizes.sequence)}


def mixed_workload(model: TransformerDenoiser, llm: LLM, sizes: Sizes, report: Report) -> dict[str, Any]:
    """The mixed workload all at once, one request after another, and as static batches."""
    jobs = mixed(llm.tokenizer, model.config, sizes.num_mixed)
    prompts, params = [job.prompt for job in jobs], [job.params for job in jobs]

    def one_at_a_time() -> None:
        for job in jobs:
            llm.generate([job.prompt], job.params, use_tqdm=False)

    plain, alone = interleaved(
        min(2, sizes.repetitions),
        lambda: llm.generate(prompts, params, use_tqdm=False),
        lambda: static_batch.decode(model, [(job.prompt, job.params) for job in jobs]),
        one_at_a_time,
        seconds_left=report.seconds_left,
    )
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {
        "ratio_plain_mixed": statistics.median(plain),
        "plain_mixed": spread(plain),
        "ratio_one_at_a_time_mixed": statistics.median(alone),
        "one_at_a_time_mixed": spread(alone),
        "engine_seconds": round(time.perf_counter() - started, 3),
        "num_forwards": sum(output.outputs[0].nfe for output in outputs),
        "main_rows": sum(
            output.outputs[0].nfe * (len(output.prompt_token_ids) + job.params.max_tokens)
            for output, job in zip(outputs, jobs, strict=True)
        ),
    }


def reused_keys(model: TransformerDenoiser, llm: LLM, sizes: Sizes, report: Report) -> dict[str, Any]:
    """Equal requests with reused keys and exactly, at equal forwards."""
    prompt_len, canvas_len = sizes.single
    asked = timing.canvases(model.config, sizes.num_reusing, prompt_len, canvas_len)
    prompts = [canvas.state.token_array()[:prompt_len].tolist() for canvas in asked]

    def decode(reuse: Literal["both"] | None) -> None:
        llm.generate(prompts, fixed_forwards(sizes, reuse), use_tqdm=False)

    decode(None)  # captures the graphs of this side, as `interleaved` does those of the other
    num, left = min(2, sizes.repetitions), report.seconds_left
    (ratios,) = interleaved(num, lambda: decode("both"), lambda: decode(None), seconds_left=left)
    return {"reuse_over_exact": statistics.median(ratios), "over_exact": spread(ratios)}


def larger_batches(
    model: TransformerDenoiser, directory: Path, load_format: str, sizes: Sizes
) -> dict[str, Any]:
    """Seconds of the mixed workload if four times as many rows share a step, so that nearly all requests run
    from the start."""
    num_rows, times = 4 * MAX_NUM_ROWS, []
    with LLM(
        directory, dtype="bfloat16", device=str(model.device), load_format=load_format, max_num_rows=num_rows
    ) as llm:
        jobs = mixed(llm.tokenizer, model.config, sizes.num_mixed)
        for _ in range(3):  # kernels are compiled and graphs captured in the first
            started = time.perf_counter()
            llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
            times.append(time.perf_counter() - started)
    return {"max_num_rows": num_rows, "engine_seconds": [round(taken, 3) for taken in times[1:]]}


def interleaved(
    repetitions: int,
    ours: Callable[[], object],
    *others: Callable[[], object],
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> list[list[float]]:
    """For each of `others`, the ratio of its time to that of `ours` in every repetition; all run in turn.

    `ours` runs once before, without being timed, to compile kernels and capture graphs. The first repetition
    always runs; a later one is skipped if too little time is left.
    """
    ratios: list[list[float]] = [[] for _ in others]
    ours()
    times: list[float] = []
    for _ in range(repetitions):
        if 1.2 * sum(times) > seconds_left():
            break
        times = []
        for decode in (ours, *others):
            started = time.perf_counter()
            decode()  # its results are on the host when it returns
            times.append(time.perf_counter() - started)
        for own, taken in zip(ratios, times[1:], strict=True):
            own.append(round(taken / times[0], 3))
    return ratios
