"""Everything that wants a GPU, in one call of at most nine minutes, as JSON and a chart:

    python3 benchmarks/gpu/run.py --output benchmarks/results/h200.json

It runs from a checkout, without an installation, wherever torch (2.11 or newer), Triton, transformers,
safetensors, msgspec, typer and rich can be imported; nothing is downloaded. Weights are random, in the shape
of LLaDA-8B. What was measured is written after every part, so that an interrupted run loses only what it had
not come to. `--small` runs the same on the embedded model in half a minute, also on a CPU: a test of this
script, whose figures mean nothing.

What the figures are:
- `step_share_ROWS`: arithmetic that a packed step needs over what the machine's rate for a square product of
  8,192 would do in that time.
- `batch1_over_floor`: a step of one request over the larger of reading the weights once and its products
  alone; `batch1_host_share`: how much of its time through the engine is not that step.
- `ratio_plain_batch1`, `ratio_plain_mixed`: visible tokens a second over those of the published code's way of
  decoding (padded batch, SDPA, all logits, fp64 softmax).
- `ratio_one_at_a_time_mixed`: over the engine with one request after another.
- `fp8_over_bf16`: time of a step of 8,192 rows in bf16 over fp8.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> str | None:
    """Puts `remask` on the path where it is not installed: links to the checkout's packages in a folder."""
    if importlib.util.find_spec("remask") is not None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="remask-path-"))
    package = folder / "remask"
    package.mkdir()
    for entry in (ROOT / "engine").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("scheduler", "workers", "benchmarks"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))
    return str(folder)


PATH = make_importable()

import torch  # noqa: E402

from remask import LLM, SamplingParams  # noqa: E402
from remask.benchmarks import plain_loop, static_batch  # noqa: E402
from remask.benchmarks.environment import environment_stamp  # noqa: E402
from remask.benchmarks.gpu import timing  # noqa: E402
from remask.benchmarks.throughput import find_model, spread, write_report  # noqa: E402
from remask.benchmarks.workloads import Job, mixed  # noqa: E402
from remask.workers.device import device_name  # noqa: E402
from remask.workers.graphs import graphs_for  # noqa: E402
from remask.workers.knee import find_knee  # noqa: E402
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser  # noqa: E402
from remask.workers.models.fp8 import quantize_layers  # noqa: E402
from remask.workers.worker import Worker  # noqa: E402

KEYS = (
    "gemm_tflops",
    "step_share_4096",
    "step_share_8192",
    "batch1_over_floor",
    "batch1_host_share",
    "ratio_plain_batch1",
    "ratio_plain_mixed",
    "ratio_one_at_a_time_mixed",
    "fp8_over_bf16",
)


class Sizes:
    """What is measured: the whole, or the same small."""

    def __init__(self, small: bool) -> None:
        self.model = "tiny" if small else "llada-8b"
        self.equal_model = "tiny" if small else "llada-124m"
        self.square = 512 if small else 8192
        self.copy_bytes = 1 << 24 if small else 1 << 30
        self.steps = {4096: 256, 8192: 512} if small else {4096: 4096, 8192: 8192}  # key -> rows
        self.sequence = (32, 32) if small else (128, 128)  # prompt and canvas of packed steps
        self.single = (32, 32) if small else (128, 256)
        self.single_steps = 8 if small else 64
        self.num_mixed = 3 if small else 64
        self.num_equal = 3 if small else 6
        self.rows = (64, 256) if small else tuple(64 << i for i in range(10))
        self.requests = (1, 2) if small else (1, 4, 16, 64, 256, 512)
        self.repetitions = 1 if small else 3


class Report:
    """The figures so far, written after every part."""

    def __init__(self, path: Path, started: float, budget: float) -> None:
        self.content: dict[str, Any] = {"environment": environment_stamp()}
        self._path, self._started, self._budget = path, started, budget

    def seconds_left(self) -> float:
        return self._budget - (time.perf_counter() - self._started)

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Runs one part. An error ends the part, not the run."""
        if self.seconds_left() <= 0:
            self.content.setdefault("left_out", []).append(name)
            return
        began = time.perf_counter()
        try:
            self.content |= measure()
        except Exception as error:
            self.content.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
        self.content.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 1)
        write_report(self.content, self._path)
        shown = {key: self.content[key] for key in KEYS if key in self.content}
        sys.stdout.write(f"{name}: {time.perf_counter() - began:.1f} s {json.dumps(shown)}\n")
        sys.stdout.flush()


def machine(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    rate = timing.gemm_flops_per_second(device, sizes.square)
    bandwidth = timing.bytes_per_second(device, sizes.copy_bytes)
    return {
        "device": device_name(device),
        "gemm_tflops": round(rate / 1e12, 3),
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
    }


def packed_steps(model: TransformerDenoiser, sizes: Sizes, report: Report) -> dict[str, Any]:
    """Shares of the matrix rate."""
    result: dict[str, Any] = {}
    for key, num_rows in sizes.steps.items():
        taken, flops = packed_step(model, sizes, num_rows)
        share = flops / taken / (report.content["gemm_tflops"] * 1e12)
        result |= {f"step_share_{key}": round(share, 3), f"step_ms_{key}": round(1000 * taken, 3)}
    return result


def packed_step(model: TransformerDenoiser, sizes: Sizes, num_rows: int) -> tuple[float, float]:
    """Median seconds of a step of so many rows, and the arithmetic that it needs."""
    num_steps, num_bursts = (4, 1) if sizes.repetitions == 1 else (8, 2)
    asked = timing.canvases(model.config, num_rows // sum(sizes.sequence), *sizes.sequence)
    worker = Worker(model, graphs_for(model))
    times = [
        timing.step_seconds(worker, asked, model.device, num_steps=num_steps, num_bursts=num_bursts)
        for _ in range(sizes.repetitions)
    ]
    steps = range(num_steps, num_steps * (num_bursts + 1))
    return statistics.median(times), timing.needed_flops(model.config, asked, steps)


def batch1(model: TransformerDenoiser, llm: LLM, sizes: Sizes, report: Report) -> dict[str, Any]:
    """One request: its step over the floor, and the host's share."""
    prompt_len, canvas_len = sizes.single
    (asked,) = timing.canvases(model.config, 1, prompt_len, canvas_len)
    worker = Worker(model, graphs_for(model))
    num_steps = min(canvas_len // 2, 64)
    taken = statistics.median(
        timing.step_seconds(worker, [asked], model.device, num_steps=num_steps, num_bursts=1)
        for _ in range(sizes.repetitions)
    )
    floors = timing.floor_seconds(
        model,
        prompt_len + canvas_len,
        asked.spec.block_length // 2,
        report.content["gigabytes_per_second"] * 1e9,
    )
    params = SamplingParams(max_tokens=canvas_len, block_length=timing.BLOCK_LEN, unmask="schedule", seed=0)
    prompt = asked.state.token_array()[:prompt_len].tolist()
    walls = []
    for _ in range(sizes.repetitions + 1):
        started = time.perf_counter()
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        walls.append((time.perf_counter() - started) / output.outputs[0].nfe)
    wall = statistics.median(walls[1:])
    return {
        "batch1_ms": round(1000 * taken, 3),
        "batch1_floor_ms": {name: round(1000 * value, 3) for name, value in floors.items()},
        "batch1_over_floor": round(taken / max(floors.values()), 3),
        "batch1_engine_ms": round(1000 * wall, 3),
        "batch1_host_share": round(1 - taken / wall, 3),
    }


def plain_batch1(model: TransformerDenoiser, llm: LLM, sizes: Sizes) -> dict[str, Any]:
    """One request through the engine and through the plain loop, at equal forwards."""
    prompt_len, canvas_len = sizes.single
    (asked,) = timing.canvases(model.config, 1, prompt_len, canvas_len)
    prompt = asked.state.token_array()[:prompt_len].tolist()
    params = SamplingParams(
        max_tokens=canvas_len,
        block_length=timing.BLOCK_LEN,
        unmask=f"schedule:{sizes.single_steps}",
        seed=0,
        ignore_eos=True,
    )
    ratios = interleaved(
        sizes.repetitions,
        lambda: llm.generate([prompt], params, use_tqdm=False),
        lambda: plain_loop.decode(model, prompt, params),
    )[0]
    return {"ratio_plain_batch1": statistics.median(ratios), "plain_batch1": spread(ratios)}


def mixed_workload(model: TransformerDenoiser, llm: LLM, sizes: Sizes) -> dict[str, Any]:
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
    )
    return {
        "ratio_plain_mixed": statistics.median(plain),
        "plain_mixed": spread(plain),
        "ratio_one_at_a_time_mixed": statistics.median(alone),
        "one_at_a_time_mixed": spread(alone),
    }


def interleaved(
    repetitions: int, ours: Callable[[], object], *others: Callable[[], object]
) -> list[list[float]]:
    """How many times as long each of the others takes, in turn with ours; what a first call sets up does not
    count."""
    ratios: list[list[float]] = [[] for _ in others]
    for repetition in range(repetitions + 1):
        times = []
        for decode in (ours, *others):
            started = time.perf_counter()
            decode()  # its results are on the host when it returns
            times.append(time.perf_counter() - started)
        if repetition:
            for own, taken in zip(ratios, times[1:], strict=True):
                own.append(round(taken / times[0], 3))
    return ratios


def equal_tokens(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Requests whose tokens the engine and the plain loop write alike, in fp32 on a small model."""
    directory, load_format = find_model(sizes.equal_model)
    with LLM(
        directory, dtype="float32", device=str(device), load_format=load_format, max_num_rows=1024
    ) as llm:
        model = load_denoiser(directory, dtype="float32", device=str(device), load_format=load_format)
        jobs: list[Job] = mixed(llm.tokenizer, model.config, sizes.num_equal)
        outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
        written = [plain_loop.decode(model, job.prompt, job.params).token_ids for job in jobs]
    equal = [out.outputs[0].token_ids == own for out, own in zip(outputs, written, strict=True)]
    return {"equal_requests_fp32": f"{sum(equal)}/{len(equal)}"}


def grid(model: TransformerDenoiser, sizes: Sizes, report: Report) -> dict[str, Any]:
    """Time of a step over rows and requests, and the knee: the fewest rows with nearly the best rate."""
    worker, points = Worker(model, graphs_for(model)), []
    for num_rows, num_requests in itertools.product(sizes.rows, sizes.requests):
        length = num_rows // num_requests
        if not 16 <= length <= model.config.max_len or report.seconds_left() < 60:
            continue
        asked = timing.canvases(model.config, num_requests, length - length // 2, length // 2)
        taken = timing.step_seconds(worker, asked, model.device, num_steps=2, num_bursts=2)
        points.append({"rows": num_rows, "requests": num_requests, "step_ms": round(1000 * taken, 3)})
    best = {
        rows: max(rows / p["step_ms"] for p in points if p["rows"] == rows)
        for rows in dict.fromkeys(p["rows"] for p in points)
    }
    return {"grid": points, "knee_rows": find_knee(list(best.items()))}


def in_fp8(model: TransformerDenoiser, sizes: Sizes) -> dict[str, Any]:
    """The same steps, then with the weights in fp8; the model stays so."""
    before = {key: packed_step(model, sizes, num_rows)[0] for key, num_rows in sizes.steps.items()}
    quantize_layers(model.model.blocks)
    after = {key: packed_step(model, sizes, num_rows)[0] for key, num_rows in sizes.steps.items()}
    ratios = {key: round(before[key] / after[key], 3) for key in before}
    return {"fp8_over_bf16": ratios[8192], "fp8_over_bf16_by_rows": ratios}


def gpu_tests() -> dict[str, Any]:
    """What the tests that need a GPU say."""
    path = os.pathsep.join(filter(None, [PATH, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/workers"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    return {"gpu_tests": lines[-1] if lines else done.stderr[-200:], "gpu_tests_failed": failed}


def draw(points: Sequence[dict[str, Any]], knee_rows: int, path: Path) -> None:
    """The chart of `grid`: milliseconds of a step over rows, a line for each number of requests."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for num_requests in sorted({point["requests"] for point in points}):
        own = [point for point in points if point["requests"] == num_requests]
        label = f"{num_requests} request{'s' * (num_requests > 1)}"
        axes.plot([p["rows"] for p in own], [p["step_ms"] for p in own], marker="o", label=label)
    axes.axvline(knee_rows, color="gray", linestyle="--", label=f"knee: {knee_rows:,} rows")
    axes.set(xscale="log", yscale="log", xlabel="rows of a step", ylabel="milliseconds of a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a chart is written beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small model, to try this script")
    parser.add_argument("--seconds", type=float, default=510, help="parts not begun by then are left out")
    parser.add_argument("--tests", action="store_true", help="also run the tests that need a GPU")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda" and not args.small:
        parser.error("there is no GPU here; --small tries the script on a CPU")
    if device.type == "cpu":
        torch.set_num_threads(1)
    sizes, report = Sizes(args.small), Report(args.output, time.perf_counter(), args.seconds)
    report.content["small"] = args.small
    report.part("machine", lambda: machine(device, sizes))
    if args.tests:
        report.part("tests", gpu_tests)
    report.part("equal tokens", lambda: equal_tokens(device, sizes))
    directory, load_format = find_model(sizes.model)
    started = time.perf_counter()
    model = load_denoiser(directory, dtype="bfloat16", device=str(device), load_format=load_format)
    timing.wait(device)
    report.content |= {
        "model": sizes.model,
        "num_parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "load_seconds": round(time.perf_counter() - started, 1),
        "attention_backend": model.attention.name,
        "kernels": model.kernels,
    }
    report.part("packed steps", lambda: packed_steps(model, sizes, report))
    with LLM(
        directory, dtype="bfloat16", device=str(device), load_format=load_format, max_num_rows=8192
    ) as llm:
        report.part("one request", lambda: batch1(model, llm, sizes, report))
        report.part("plain loop", lambda: plain_batch1(model, llm, sizes))
        report.part("mixed workload", lambda: mixed_workload(model, llm, sizes))
    report.part("grid", lambda: grid(model, sizes, report))
    if "grid" in report.content:
        draw(report.content["grid"], report.content["knee_rows"], args.output.with_suffix(".png"))
    report.part("fp8", lambda: in_fp8(model, sizes))
    missing = [key for key in KEYS if key not in report.content]
    sys.stdout.write(f"{args.output}: {len(KEYS) - len(missing)} of {len(KEYS)} figures\n")
    if missing:
        sys.exit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
