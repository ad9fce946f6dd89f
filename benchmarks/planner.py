"""How fast a model will be, from its shape and two rates of a machine.

    remask plan --model models/LLaDA-8B-Instruct --gpu h200 --prompt-len 128 --canvas-len 256

A step of B canvases of L rows each (prompt and canvas), of which m a canvas are candidates, takes

    T = max(F / rate, W / bandwidth) + overhead
    F = linear layers of B L rows, the last one and the head of B m
        + 4 B L ((layers - 1) L + m) heads head_dim           (attention sees the whole sequence)
    W = weights, read once, without the embedding's rows that are not looked up; of E experts, K of them
        active, E (1 - (1 - K / E)^rows) are read

and a request of n tokens at k tokens a forward takes n / k steps. With `reuse` a share of the forwards of a
block is full, and the others compute r rows a canvas: the block, or on average half of the canvas and half a
block for `prefix`. F is the mean of both, with 4 r L heads head_dim a layer for the attention of the light
ones, which also read 2 L layers kv_heads head_dim numbers of kept keys and values. An autoregressive engine
of the same shape with a cache of keys and values decodes one token of B requests in

    T = max(F / rate, (W + C) / bandwidth) + overhead
    F = all layers and the head of B rows + 4 B c layers heads head_dim
    C = 2 B c layers kv_heads head_dim bytes        (c: the context, on average the prompt and n / 2)

after a prompt's F of its own. The *knee* is the number of rows whose arithmetic takes as long as reading the
weights; up to there rows are free. From the *crossover* on the autoregressive engine writes more tokens a
second: its step reads the same weights but computes one row a request instead of L.

GPU rates are the makers' figures for dense bf16 and memory, and the shares of them that good kernels reach
are assumptions (`MATRIX_SHARE`, `MEMORY_SHARE`); "this" measures the machine at hand instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table

from remask import InvalidRequest
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.gpu import timing
from remask.benchmarks.throughput import find_model
from remask.benchmarks.utilization import gemm_rate, linear_flops
from remask.benchmarks.workloads import CANVAS_LENS, FIXED_LEN, PROMPT_LENS
from remask.scheduler.errors import did_you_mean
from remask.workers.burst.graphs import graphs_for
from remask.workers.models.config import TransformerConfig
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.loading import read_config
from remask.workers.worker import Worker

MATRIX_SHARE, MEMORY_SHARE = 0.7, 0.85
GPU_OVERHEAD = 5e-5  # seconds of a step: a graph's launch
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MEASURED_ROWS = (256, 512, 1024)
RIVAL = "an autoregressive engine of this shape"
WORKLOADS = {
    "mixed": (sum(PROMPT_LENS) // 2, round(sum(CANVAS_LENS) / len(CANVAS_LENS))),
    "fixed": (FIXED_LEN, FIXED_LEN),
}


@dataclass(frozen=True)
class Machine:
    """What a step's time depends on.

    Attributes:
        flops_per_second, bytes_per_second: that are reached.
        overhead: seconds of a step, whatever it computes.
    """

    flops_per_second: float
    bytes_per_second: float
    overhead: float


# Dense bf16 TFLOP/s and GB/s, from the makers' data sheets.
GPUS = {
    name: Machine(MATRIX_SHARE * tflops * 1e12, MEMORY_SHARE * gigabytes * 1e9, GPU_OVERHEAD)
    for name, tflops, gigabytes in (
        ("a100-80gb", 312, 2039),
        ("l40s", 362, 864),
        ("rtx4090", 165, 1008),
        ("h100", 989, 3350),
        ("h200", 989, 4800),
        ("b200", 2250, 8000),
    )
}


@dataclass(frozen=True)
class Load:
    """Requests as a plan sees them: all alike.

    Attributes:
        prompt_len, canvas_len: tokens.
        block_len: slots a block; half of them are masked on average.
        tokens_per_forward: that a policy commits.
        reuse, refresh: see `SamplingParams`.
    """

    prompt_len: int
    canvas_len: int
    block_len: int
    tokens_per_forward: float
    reuse: Literal["prefix", "both"] | None = None
    refresh: int | None = None

    def check(self) -> None:
        """Raises InvalidRequest if an option is invalid."""
        for name in ("prompt_len", "canvas_len", "block_len"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "must be at least 1")
        if not 0 < self.tokens_per_forward <= self.canvas_len:
            fix = f"must be above 0 and at most the canvas ({self.canvas_len})"
            raise InvalidRequest("tokens_per_forward", self.tokens_per_forward, fix)
        if self.reuse not in (None, "prefix", "both"):
            raise InvalidRequest("reuse", self.reuse, "use prefix or both")
        if self.refresh is not None and (self.reuse is None or self.refresh < 2):
            raise InvalidRequest("refresh", self.refresh, "must be at least 2, and needs reuse")

    @property
    def full_rows(self) -> int:
        """Rows of a full forward of a canvas."""
        return self.prompt_len + self.canvas_len

    @property
    def light_rows(self) -> float:
        """Mean rows of a light forward of a canvas."""
        width = min(self.block_len, self.canvas_len)
        return width if self.reuse == "both" else (self.canvas_len + width) / 2

    @property
    def full_share(self) -> float:
        """Share of the forwards that are full."""
        if self.reuse is None:
            return 1.0
        forwards = max(1.0, min(self.block_len, self.canvas_len) / self.tokens_per_forward)
        return (1 if self.refresh is None else math.ceil(forwards / self.refresh)) / forwards

    @property
    def mean_rows(self) -> float:
        """Mean rows of a forward of a canvas."""
        return self.full_share * self.full_rows + (1 - self.full_share) * self.light_rows


def step_flops(config: TransformerConfig, batch_size: int, load: Load) -> float:
    """Arithmetic of a step."""
    masked = (min(load.block_len, load.canvas_len) + 1) / 2
    pairs = load.full_rows * ((config.num_layers - 1) * load.mean_rows + masked)
    products = linear_flops(config, round(batch_size * load.mean_rows), round(batch_size * masked))
    return products + 4 * batch_size * pairs * config.num_heads * config.head_dim


def key_bytes(config: TransformerConfig, itemsize: int, num_rows: float) -> float:
    """Bytes of the keys and values of rows."""
    return 2 * num_rows * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def weight_bytes(config: TransformerConfig, itemsize: int, num_rows: float) -> float:
    """Bytes of the weights that a step reads. A step reads the experts that at least one of its `num_rows`
    rows is sent to, the mean number of which is taken."""
    numbers = linear_flops(config, 1, 1) / 2
    if (experts := config.experts) is not None:
        active = experts.num_active
        read = experts.count * (1 - (1 - active / experts.count) ** num_rows)
        numbers += (read - active) * 3 * experts.size * config.hidden_size * config.num_layers
    return numbers * itemsize


def step_seconds(machine: Machine, config: TransformerConfig, itemsize: int, batch: int, load: Load) -> float:
    """Time of a denoising step."""
    compute = step_flops(config, batch, load) / machine.flops_per_second
    read = weight_bytes(config, itemsize, batch * load.mean_rows)
    read += batch * (1 - load.full_share) * key_bytes(config, itemsize, load.full_rows)
    return max(compute, read / machine.bytes_per_second) + machine.overhead


def decode_seconds(
    machine: Machine, config: TransformerConfig, itemsize: int, batch: int, load: Load
) -> float:
    """Seconds that an autoregressive engine of the same shape takes for one token of each request. The
    prefill of the prompt is spread over the tokens of the canvas."""
    context = load.prompt_len + load.canvas_len / 2
    width = config.num_heads * config.head_dim
    flops = linear_flops(config, batch, batch) + 4 * batch * context * config.num_layers * width
    cache = key_bytes(config, itemsize, batch * context)
    read = (weight_bytes(config, itemsize, batch) + cache) / machine.bytes_per_second
    prompt = linear_flops(config, load.prompt_len, 1) + 2 * load.prompt_len**2 * config.num_layers * width
    prefill = batch * prompt / machine.flops_per_second / load.canvas_len
    return max(flops / machine.flops_per_second, read) + machine.overhead + prefill


def knee_rows(machine: Machine, config: TransformerConfig, itemsize: int) -> int:
    """Rows whose arithmetic takes as long as reading the weights, those of all experts."""
    seconds = weight_bytes(config, itemsize, math.inf) / machine.bytes_per_second
    return round(seconds * machine.flops_per_second / linear_flops(config, 1, 0))


def plan(machine: Machine, config: TransformerConfig, itemsize: int, load: Load) -> dict[str, Any]:
    """The figures over batch sizes, the knee, and the crossover (None: at none of these sizes)."""
    points, crossover = [], None
    num_steps = load.canvas_len / load.tokens_per_forward
    for batch in BATCH_SIZES:
        step = step_seconds(machine, config, itemsize, batch, load)
        token = decode_seconds(machine, config, itemsize, batch, load)
        points.append(
            {
                "batch_size": batch,
                "rows": round(batch * load.mean_rows),
                "step_ms": round(1000 * step, 3),
                "tokens_per_second": round(batch * load.tokens_per_forward / step, 1),
                "latency_seconds": round(num_steps * step, 4),
                "autoregressive_tokens_per_second": round(batch / token, 1),
                "autoregressive_latency_seconds": round(load.canvas_len * token, 4),
                "tokens_per_forward_to_win": round(step / token, 2),
            }
        )
        if crossover is None and batch / token > batch * load.tokens_per_forward / step:
            crossover = batch
    return {"knee_rows": knee_rows(machine, config, itemsize), "crossover": crossover, "points": points}


def measure_machine(model: TransformerDenoiser) -> Machine:
    """Measures this machine: its rates for the model's products, and the overhead of a small step."""
    device = model.device
    rate = max(gemm_rate(model.model, [(rows, rows // 8) for rows in MEASURED_ROWS]) for _ in range(2))
    bandwidth = timing.bytes_per_second(device, 1 << 28)
    bare = Machine(rate, bandwidth, 0.0)
    load = Load(16, 16, 16, 1.0)
    taken = measured_step(model, 1, load)
    expected = step_seconds(bare, model.config, model.model.embedding.element_size(), 1, load)
    return Machine(rate, bandwidth, max(0.0, taken - expected))


def measured_step(model: TransformerDenoiser, batch: int, load: Load) -> float:
    """Seconds of a real step of the engine, over a whole block."""
    asked = timing.canvases(model.config, batch, load.prompt_len, load.canvas_len)
    worker = Worker(model, graphs_for(model))
    return timing.step_seconds(
        worker, asked, model.device, num_steps=asked[0].spec.block_length // 2, num_bursts=1
    )


def check(
    model: TransformerDenoiser, machine: Machine, load: Load, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Planned and real steps on the machine at hand."""
    itemsize, found = model.model.embedding.element_size(), []
    for batch in batches:
        planned = step_seconds(machine, model.config, itemsize, batch, load)
        real = measured_step(model, batch, load)
        found.append(
            {
                "batch_size": batch,
                "planned_ms": round(1000 * planned, 2),
                "real_ms": round(1000 * real, 2),
                "planned_over_real": round(planned / real, 3),
            }
        )
    return found


def report(model: str, gpu: str, load: Load, dtype: str, check_batches: Sequence[int] = ()) -> dict[str, Any]:
    """The plan of a model on a machine.

    Args:
        model: an embedded shape or a directory with `config.json`; weights are needed for "this" only, and
            random ones do.
        gpu: a name of `GPUS`, or "this".
        dtype: of the weights.
        check_batches: batch sizes at which real steps are timed beside the plan; for "this".

    Raises:
        InvalidRequest: an argument or the model is invalid.
    """
    load.check()
    directory, load_format = find_model(model)
    config, itemsize = read_config(directory)[1], getattr(torch, dtype).itemsize
    length, exact = load.full_rows, replace(load, reuse=None, refresh=None)
    if length > config.max_len:
        raise InvalidRequest(
            "canvas_len", load.canvas_len, f"{length} tokens exceed the model's {config.max_len}"
        )
    checked: list[dict[str, Any]] = []
    if gpu == "this":
        denoiser = load_denoiser(directory, dtype=dtype, load_format=load_format)
        machine = measure_machine(denoiser)
        checked = check(denoiser, machine, load, check_batches)
    elif gpu in GPUS:
        machine = GPUS[gpu]
    else:
        raise InvalidRequest("gpu", gpu, f"unknown; {did_you_mean(gpu, [*GPUS, 'this'])}")
    content = {
        "benchmark": "plan",
        "environment": environment_stamp(),
        "model": model,
        "dtype": dtype,
        "gpu": gpu,
        "tflops": round(machine.flops_per_second / 1e12, 4),
        "gigabytes_per_second": round(machine.bytes_per_second / 1e9, 1),
        "overhead_ms": round(1000 * machine.overhead, 3),
        "load": {name: getattr(load, name) for name in load.__dataclass_fields__},
        **plan(machine, config, itemsize, load),
        **({"exact_crossover": plan(machine, config, itemsize, exact)["crossover"]} if load.reuse else {}),
        **({"check": checked} if checked else {}),
    }
    return {**content, "notes": in_words(content)}


def as_table(content: dict[str, Any]) -> Table:
    """The plan for a terminal."""
    table = Table(
        "batch size", "rows", "step ms", "tokens/s", "latency s", "AR tokens/s", "AR latency s",
        "tokens/forward to win", title=f"{content['model']} in {content['dtype']} on {content['gpu']}",
    )  # fmt: skip
    for point in content["points"]:
        table.add_row(*(f"{value:,}" for value in point.values()))
    return table


def in_words(content: dict[str, Any]) -> list[str]:
    """Knee, crossover and how far the plan can be trusted."""
    load = content["load"]
    sentences = [f"knee: {content['knee_rows']:,} rows"]
    if load.get("reuse") is None:
        sentences.append(_rival(content["crossover"], load["tokens_per_forward"]))
    else:
        reused = _rival(content["crossover"], load["tokens_per_forward"])
        exact = _rival(content["exact_crossover"], load["tokens_per_forward"])
        sentences += [f"reuse={load['reuse']}: {reused}", f"without reuse: {exact}"]
    sentences += [
        f"checked at {c['batch_size']}: {c['planned_ms']:.1f} ms planned, {c['real_ms']:.1f} ms real"
        for c in content.get("check", ())
    ]
    return sentences


def _rival(crossover: int | None, tokens: float) -> str:
    """From where on an autoregressive engine is faster."""
    if crossover is None:
        return f"{RIVAL} is slower at all these sizes, at {tokens:g} tokens a forward"
    since = f"from {crossover} requests on" if crossover > 1 else "at any number of requests"
    return f"{RIVAL} is faster {since}, at {tokens:g} tokens a forward"


def load_of(
    workload: str | None,
    prompt_len: int,
    canvas_len: int,
    block_len: int,
    tokens: float,
    reuse: Any = None,
    refresh: int | None = None,
) -> Load:
    """Lengths as given, or the mean ones of a workload.

    Raises:
        InvalidRequest: there is no such workload.
    """
    if workload is not None:
        if workload not in WORKLOADS:
            raise InvalidRequest("workload", workload, f"unknown; {did_you_mean(workload, WORKLOADS)}")
        prompt_len, canvas_len = WORKLOADS[workload]
    return Load(prompt_len, canvas_len, min(block_len, canvas_len), tokens, reuse, refresh)
