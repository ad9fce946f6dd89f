"""The knee: the number of rows above which a larger forward adds latency and no throughput.

A forward of few rows is bound by reading weights and by the host. Above some hundreds or thousands of rows it
is bound by arithmetic. The number depends on model, device and dtype, so the first start of an engine
measures it with real bursts and keeps it in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import SamplingParams, resolve
from remask.workers.burst.graphs import StepGraphs
from remask.workers.models.config import TransformerConfig
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.models.fp8 import ScaledWeight
from remask.workers.models.row_ops import TILED
from remask.workers.startup.device import device_name
from remask.workers.worker import Worker

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # share of the best rate that a smaller batch may lose, and that counts as a gain
MAX_CANVAS_ROWS = 128  # prompt and canvas of the measured requests
MIN_ROWS = 2048  # always measured, time permitting, so that a transient slowdown is not taken for the knee
MAX_DOUBLINGS = 10
REPETITIONS = 3
GRAPH_STEPS = 8  # difference in steps between the two bursts that are timed on a GPU
SECONDS = 15.0  # limit of a measurement, which ends with the current forward


def knee(model: TransformerDenoiser, graphs: StepGraphs | None = None) -> int:
    """Rows of the knee, from the cache or measured.

    If the cache cannot be read or written, every start measures. A measurement that ran out of time is not
    kept.

    Args:
        model: the model as the worker runs it.
        graphs: graphs of its steps; None: steps are not captured.
    """
    key = {**_key(model), "graphs": graphs is not None}
    path = _cache_path(key)
    try:
        if path is not None and (rows := int(json.loads(path.read_text())["knee"])) > 0:
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.info("looking for the best number of rows on %s; this takes some seconds, once", key["device"])
    points, complete = measure(model, graphs)
    rows = find_knee(points)
    if complete and path is not None:
        _write(path, {"knee": rows, "rows_and_rows_per_second": points, "of": key})
    return rows


def find_knee(points: Sequence[tuple[int, float]]) -> int:
    """The fewest rows whose rate is within TOLERANCE of the best.

    Args:
        points: rows, in ascending order, and rows per second.
    """
    best = max(rate for _, rate in points)
    return next(rows for rows, rate in points if rate >= (1 - TOLERANCE) * best)


def num_flat(points: Sequence[tuple[int, float]]) -> int:
    """Number of points at the end that gain nothing over the best before them."""
    best, count = 0.0, 0
    for _, rate in points:
        count = 0 if rate > (1 + TOLERANCE) * best else count + 1
        best = max(best, rate)
    return count


def measure(
    model: TransformerDenoiser, graphs: StepGraphs | None = None
) -> tuple[list[tuple[int, float]], bool]:
    """Measures steps of 1, 2, 4, ... canvases of one shape, until two doublings in a row have gained nothing.

    Then every size is measured again and its best rate counts, because other work on the machine only slows
    steps down.

    Returns:
        Rows and rows per second of each size; whether the measurement passed the knee in time.
    """
    canvas_rows = min(MAX_CANVAS_ROWS, model.config.max_len)
    canvases = _examples(model.config, canvas_rows, 1 << (MAX_DOUBLINGS - 1))
    worker = Worker(model, graphs)
    worker.run(_burst(canvases[:1], 1))  # the first forward also allocates
    deadline = time.perf_counter() + SECONDS

    def rate(num_rows: int) -> float:
        return num_rows / _step_seconds(worker, canvases[: num_rows // canvas_rows])

    points: list[tuple[int, float]] = []
    for num_rows in (canvas_rows << i for i in range(MAX_DOUBLINGS)):
        try:
            points.append((num_rows, rate(num_rows)))
        except torch.OutOfMemoryError:
            if not points:
                raise
            break
        if time.perf_counter() > deadline:
            return points, False
        if num_rows >= MIN_ROWS and num_flat(points) >= 2:
            break
    for _ in range(REPETITIONS - 1):
        for i, (num_rows, best) in enumerate(points):
            if time.perf_counter() > deadline:
                return points, True
            points[i] = (num_rows, max(best, rate(num_rows)))
    return points, True


def _step_seconds(worker: Worker, canvases: Sequence[Canvas]) -> float:
    """Seconds of a step of some canvases.

    On a GPU packing does not count, because the host packs a burst while the GPU computes the one before. A
    long and a short burst take the same time to pack, so their difference is device time.
    """
    short = _burst(canvases, 1)
    if not worker.overlaps:
        return _seconds(worker, short)
    for _ in range(2):  # a shape is captured at its second use
        _seconds(worker, short)
    longer = _seconds(worker, _burst(canvases, 1 + GRAPH_STEPS)) - _seconds(worker, short)
    return max(longer / GRAPH_STEPS, 1e-9)


def _seconds(worker: Worker, batch: StepBatch) -> float:
    started = time.perf_counter()
    result = worker.run(batch)
    if result.failure is not None:
        raise torch.OutOfMemoryError("a forward does not fit into the worker's memory")
    return time.perf_counter() - started


def _examples(config: TransformerConfig, num_rows: int, count: int) -> list[Canvas]:
    """`count` canvases of `num_rows` rows each. Their prompts differ, because equal sequences are computed
    once."""
    canvas_len, mask_id = max(1, num_rows // 2), config.mask_id
    # One token a step, so that no canvas finishes before the burst.
    params = resolve(SamplingParams(max_tokens=canvas_len, unmask="schedule"))
    rng = np.random.default_rng(0)
    ids = np.delete(np.arange(config.vocab_size), mask_id)
    prompts = ids[rng.integers(len(ids), size=(count, num_rows - canvas_len))].tolist()
    return [
        new_canvas(
            "knee", 0, prompt, params, seed=0, sample=0, mask_id=mask_id, stop_ids=[], shift=config.shift
        )
        for prompt in prompts
    ]


def _burst(canvases: Sequence[Canvas], num_steps: int) -> StepBatch:
    return StepBatch(
        burst_id=0,
        num_steps=num_steps,
        specs=[canvas.spec for canvas in canvases],
        states=[canvas.state for canvas in canvases],
    )


def _key(model: TransformerDenoiser) -> dict[str, Any]:
    """Everything that the knee depends on."""
    return {
        "model": asdict(model.config),
        "device": device_name(model.device),
        "dtype": str(model.model.embedding.dtype),
        "attention": model.attention.name,
        "kernels": model.kernels,
        "quantized": isinstance(model.model.blocks[0].qkv, ScaledWeight),
        "pack_rows": model.pack_rows,
        "tiles": model.ops is TILED,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "remask": version("remask"),
    }


def _cache_path(key: dict[str, Any]) -> Path | None:
    """A file for each key, so that concurrent starts do not write the same file; None: no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        directory = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return directory / "remask" / "knee" / f"{digest}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)  # atomic: several engines may start at once
    except OSError as error:
        logger.warning("the measured knee cannot be kept in %s: %s", path.parent, error)
