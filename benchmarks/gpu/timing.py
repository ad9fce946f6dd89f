"""Times on a device: rates of the machine, steps of the engine, and lower bounds of a step's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from remask.benchmarks.utilization import linear_flops, linear_inputs, run_linear_layers, wait
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import SamplingParams, resolve
from remask.workers.models.config import TransformerConfig
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Launched, NotRun, Worker

BLOCK_LEN = 32


def seconds(function: Callable[[], object], device: torch.device, *, least: float = 0.2) -> float:
    """Median seconds of a call, after three that warm up; at least five calls, for at least `least` seconds.

    On a GPU the host runs ahead, so that only the device's time counts.
    """
    for _ in range(3):
        function()
    wait(device)
    if device.type != "cuda":
        return statistics.median(_host_seconds(function, least))
    started = time.perf_counter()
    function()
    wait(device)
    count = max(5, min(200, int(least / max(time.perf_counter() - started, 1e-6))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    wait(device)
    return statistics.median(first.elapsed_time(second) / 1000 for first, second in pairwise(events))


def _host_seconds(function: Callable[[], object], least: float) -> list[float]:
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


def gemm_flops_per_second(device: torch.device, size: int) -> float:
    """Rate of a square product: in bf16 on a GPU, in fp32 on a CPU, which may have no units for bf16."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), device)


def bytes_per_second(device: torch.device, num_bytes: int) -> float:
    """Rate of a copy within the device's memory; bytes read and bytes written count."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device)


def floor_seconds(
    model: TransformerDenoiser, num_rows: int, num_candidates: int, bandwidth: float
) -> dict[str, float]:
    """Lower bounds of a step in seconds: reading its weights once, and computing only its matrix products."""
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    embedding = model.model.embedding.nbytes if model.model.head is not None else 0  # only looked up
    inputs = linear_inputs(model.model, num_rows, num_candidates)
    products = seconds(lambda: run_linear_layers(model.model, num_rows, num_candidates, inputs), model.device)
    return {"weights": (weights - embedding) / bandwidth, "products": products}


def canvases(
    config: TransformerConfig,
    count: int,
    prompt_len: int,
    canvas_len: int,
    params: SamplingParams | None = None,
) -> list[Canvas]:
    """Canvases of masks behind different prompts; without parameters they commit one token a step."""
    block_len = min(BLOCK_LEN, canvas_len)
    params = params or SamplingParams(max_tokens=canvas_len, block_length=block_len, unmask="schedule")
    resolved = resolve(params)
    ids = [token for token in range(config.vocab_size) if token != config.mask_id]
    prompts = ([ids[(i + k) % len(ids)] for k in range(prompt_len)] for i in range(count))
    of_model = {"mask_id": config.mask_id, "shift": config.shift, "stop_ids": []}
    return [
        new_canvas(str(i), i, prompt, resolved, seed=i, sample=0, **of_model)
        for i, prompt in enumerate(prompts)
    ]


def step_seconds(
    worker: Worker, asked: Sequence[Canvas], device: torch.device, *, num_steps: int, num_bursts: int
) -> float:
    """Seconds of a step in bursts that follow each other, with the next burst always in flight. Three bursts
    before them are not timed: two compile kernels and capture graphs, and the timed ones follow the third."""
    specs = [canvas.spec for canvas in asked]

    def first(burst_id: int) -> StepBatch:
        states = [canvas.state for canvas in asked]
        return StepBatch(burst_id=burst_id, num_steps=num_steps, specs=specs, states=states)

    for _ in range(2):
        _collect(worker, worker.launch(first(0)))
    launched = worker.launch(first(0))
    if isinstance(launched, Launched):
        launched.enqueue_rest()
    wait(device)
    started = time.perf_counter()
    for burst_id in range(1, num_bursts + 1):
        states = list(range(len(asked)))
        following = StepBatch(
            burst_id=burst_id, num_steps=num_steps, follows=burst_id - 1, specs=specs, states=states
        )
        ahead = worker.launch(following)
        _collect(worker, launched)
        launched = ahead
    _collect(worker, launched)
    return (time.perf_counter() - started) / (num_steps * num_bursts)


def _collect(worker: Worker, launched: Launched | NotRun) -> None:
    result = worker.collect(launched)
    if result.failure is not None:
        raise torch.OutOfMemoryError("a burst does not fit into memory")


def needed_flops(config: TransformerConfig, asked: Sequence[Canvas], steps: range) -> float:
    """FLOPs that a step of equal canvases needs, as the mean over `steps`.

    Args:
        config: of the model.
        asked: canvases from `canvases`, which fill one slot of the active block in each step.
        steps: steps to average over, counted from 0.
    """
    block_len, num_rows = asked[0].spec.block_length, asked[0].state.sequence_len
    masked = statistics.mean(block_len - step % block_len for step in steps)
    attention = num_rows * ((config.num_layers - 1) * num_rows + masked) * config.num_heads * config.head_dim
    products = linear_flops(config, len(asked) * num_rows, round(len(asked) * masked))
    return products + 4 * len(asked) * attention
