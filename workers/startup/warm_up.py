"""Compiles and loads every kernel before the first request.

Triton compiles a kernel's variant at its first launch, which takes seconds. Variants depend on the model and
on the statistics that the head computes, not on the number of rows. One small burst for each set of
statistics therefore launches every variant that requests can need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import SamplingParams, resolve
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import TransformerDenoiser

logger = logging.getLogger(__name__)

CANVAS_LEN = 2
# Policies that read the proposal's probability, and beside it: nothing, the margin, the entropy, and both.
UNMASK = ("threshold:0.9", "schedule:score=margin", "entropy_bound:1.0", "entropy_bound:order=margin")


def warm_up(model: TransformerDenoiser, run: Callable[[StepBatch], StepResult]) -> None:
    """Compiles and loads the kernels of a model; logs the seconds that it took.

    Args:
        model: the model as the worker runs it.
        run: runs a burst on the model as a worker does, and returns when it has finished.

    Raises:
        RuntimeError: a kernel does not run on this device.
    """
    started = time.perf_counter()
    for number, unmask in enumerate(UNMASK):
        canvas = _canvas(model.config, unmask)
        batch = StepBatch(burst_id=number, num_steps=1, specs=[canvas.spec], states=[canvas.state])
        result = run(batch)
        if result.failure not in (None, "memory"):  # `row_limit` measures memory next
            raise RuntimeError(f"the kernels do not run on {model.device}: {result.error}")
    logger.info("compiled and loaded the kernels in %.1f seconds", time.perf_counter() - started)


def _canvas(config: ModelConfig, unmask: str) -> Canvas:
    """A canvas of one block, with a shadow row for each slot and sampled tokens."""
    canvas_len = min(CANVAS_LEN, config.max_len)
    params = SamplingParams(
        max_tokens=canvas_len, block_length=canvas_len, unmask=unmask, remask="wino", temperature=1.0
    )
    mask_id = config.mask_id
    return new_canvas(
        "warm-up", 0, [], resolve(params), seed=0, sample=0, mask_id=mask_id, stop_ids=[], shift=config.shift
    )
