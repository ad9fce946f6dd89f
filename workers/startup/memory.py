"""The number of rows that fit the memory of a GPU.

A worker measures it at its start, with worst-case bursts. It bounds the rows of a batch. It is an estimate: a
burst can still run out of memory. A CPU has no limit. This file does not depend on the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import SamplingParams, resolve
from remask.workers.burst.graphs import GRAPH_BYTES
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import TransformerDenoiser

logger = logging.getLogger(__name__)

MAX_CANVAS_LEN = 512  # of the canvases that memory is measured with
MAX_ROWS = 1 << 14  # above it the peak grows linearly
GROWTH = 4  # factor between the rows of two measurements
RESERVE_BYTES = GRAPH_BYTES + (1 << 30)  # for captured steps, and for gaps between allocations


def row_limit(
    model: TransformerDenoiser,
    utilization: float,
    run: Callable[[StepBatch], StepResult],
    reserved_bytes: int = 0,
) -> int | None:
    """Maximum rows of a forward that fit the device's memory beside the weights; None on a CPU.

    Args:
        model: the model as the worker runs it.
        utilization: share of the GPU's memory that this process may use, in (0, 1].
        run: runs a burst on the model as a worker does, and returns when it has finished.
        reserved_bytes: that kept keys take.

    Raises:
        InvalidRequest: there is no room for a single row.
    """
    if model.device.type != "cuda":
        return None

    def peak_bytes(num_rows: int) -> int | None:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        result = run(demanding_burst(model.config, num_rows))
        peak = torch.cuda.max_memory_allocated(model.device) - before
        return peak if result.failure is None else None

    smallest = demanding_canvas(model.config).num_rows
    peak_bytes(smallest)  # the first forward also allocates what stays
    points, too_many = measure(peak_bytes, smallest)
    torch.cuda.empty_cache()
    limit = limit_from(points, room_bytes(model.device, utilization) - reserved_bytes)
    if too_many is not None:
        limit = min(limit, too_many - 1)
    logger.info("memory for %d rows on %s; measured rows and peak bytes: %s", limit, model.device, points)
    if limit < 1:
        problem = "leaves no room beside the weights; use more of it, quantization or a larger GPU"
        raise InvalidRequest("gpu_memory_utilization", utilization, problem)
    return limit


def measure(
    peak_bytes: Callable[[int], int | None], smallest: int
) -> tuple[list[tuple[int, int]], int | None]:
    """Measures forwards of growing size, at least two, up to `MAX_ROWS` rows.

    Args:
        peak_bytes: peak memory in bytes of a forward with this number of rows; None: out of memory.
        smallest: rows of the first forward.

    Returns:
        Rows and peak bytes of each forward that fits; rows of the first that does not fit (None: all fit).
    """
    points: list[tuple[int, int]] = []
    num_rows = smallest
    while num_rows <= MAX_ROWS or len(points) < 2:
        peak = peak_bytes(num_rows)
        if peak is None:
            return points, num_rows
        points.append((num_rows, peak))
        num_rows *= GROWTH
    return points, None


def limit_from(points: Sequence[tuple[int, int]], budget_bytes: int) -> int:
    """Number of rows that fit, extrapolated through the last two points; at least 0.

    If the peak does not grow between them, or there is one point, memory counts as proportional to the rows.
    Without a point the result is 0.

    Args:
        points: rows, in ascending order, and peak bytes.
        budget_bytes: maximum peak in bytes.
    """
    if not points:
        return 0
    (fewer, lower), (num_rows, peak) = points[-2] if len(points) > 1 else (0, 0), points[-1]
    if peak <= lower:
        fewer = lower = 0
    return max(0, num_rows + (budget_bytes - peak) * (num_rows - fewer) // (peak - lower))


def room_bytes(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU's memory for bursts: the rest of this process's share, at most the free memory."""
    free, total = torch.cuda.mem_get_info(device)
    ours = int(utilization * total) - torch.cuda.memory_reserved(device)
    return min(ours, free) - RESERVE_BYTES


def demanding_canvas(config: ModelConfig, *, special: bool = False) -> Canvas:
    """A worst-case canvas: one block, fully masked, with a shadow row for each slot, sampled tokens and a
    policy that reads all statistics.

    Args:
        config: configuration of the model.
        special: whether its rows also need whole logits.
    """
    canvas_len = min(MAX_CANVAS_LEN, config.max_len)
    params = SamplingParams(
        max_tokens=canvas_len,
        block_length=canvas_len,
        unmask="entropy_bound:order=margin",
        remask={"type": "wino", "ban_old": special},
        temperature=1.0,
        top_p=0.9 if special else 1.0,
        trace=True,
    )
    return new_canvas(
        "memory",
        0,
        [],
        resolve(params),
        seed=0,
        sample=0,
        mask_id=config.mask_id,
        stop_ids=[],
        shift=config.shift,
    )


def demanding_burst(config: ModelConfig, num_rows: int) -> StepBatch:
    """A worst-case burst of `num_rows` rows, a multiple of one canvas's rows.

    One canvas is special: whole logits are processed in chunks, so more special canvases need no more memory.
    """
    special, plain = (demanding_canvas(config, special=special) for special in (True, False))
    canvases = [special] + [plain] * (num_rows // plain.num_rows - 1)
    return StepBatch(
        burst_id=0,
        num_steps=2,  # the first commits what the shadow rows of the second verify
        specs=[canvas.spec for canvas in canvases],
        states=[canvas.state for canvas in canvases],
    )
