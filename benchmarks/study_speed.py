"""The study against the plain loop, on greedy cells of a grid, with equal tokens.

    python -m remask.benchmarks.study_speed --output benchmarks/results/study_speed.json

The cells of the first section of `benchmarks/study/default.toml` that the plain loop can decode (without
remasking and with WINO, on its puzzles) run on the first prompts, in the order of the study: through one
`batch_invariant` engine, which shares forwards and computes equal sequences once, and one at a time. Both
compute in fp32 on one CPU thread. A ratio is taken within a repetition.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from remask import LLM, SamplingParams
from remask.benchmarks import plain_loop, repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.study.grid import Grid, cells, read_grid, tasks_of
from remask.benchmarks.throughput import find_model
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

GRID = Path(__file__).parent / "study" / "default.toml"
ARMS = ("plain", "wino")
NUM_PROMPTS = 3  # of each task
MAX_LIVE = 4096
HEADER = ("prompts", "cells", "samples", *repeated.RATES)

Jobs = Sequence[tuple[list[int], SamplingParams]]


def jobs_of(llm: LLM, num_prompts: int) -> tuple[Jobs, int]:
    """Prompts and parameters in the order of the study, and the number of cells."""
    grid = read_grid(GRID)
    first = msgspec.structs.replace(grid.grid[0], arms=ARMS, num_prompts=num_prompts)
    own: Grid = msgspec.structs.replace(grid, grid=(first,))
    tasks = tasks_of(own)
    every = cells(own, tasks)
    intake, jobs = llm.engine.intake, []
    prompts = {name: tasks[name].texts(grid.seed, num_prompts) for name in first.tasks}
    for index in range(num_prompts):
        for cell in every:
            params = msgspec.structs.replace(cell.params(index), trace=False, ignore_eos=True)
            jobs.append((intake.check(prompts[cell.task][index], params).ids, params))
    return jobs, len(every)


def measure(num_prompts: int, repetitions: int, steadiness: Steadiness) -> dict[str, Any]:
    """Samples a second of both, and their ratio.

    Raises:
        RuntimeError: the two write different tokens.
    """
    directory, _ = find_model("tiny")
    model = load_denoiser(directory, dtype="float32", device="cpu")
    assert isinstance(model, TransformerDenoiser), "a checkpoint"
    rates: list[tuple[float, float]] = []
    with LLM("tiny", dtype="float32", device="cpu", batch_invariant=True) as llm:
        jobs, num_cells = jobs_of(llm, num_prompts)
        llm.generate(jobs[0][0], jobs[0][1], use_tqdm=False)  # warms up
        for _ in range(repetitions):
            started = time.perf_counter()
            intake = llm.engine.intake
            requests = [intake.request(intake.check(ids, params)) for ids, params in jobs]
            outputs = {output.request_id: output for output in llm.engine.serve(requests, max_live=MAX_LIVE)}
            middle = time.perf_counter()
            plain = [plain_loop.decode(model, ids, params) for ids, params in jobs]
            ended = time.perf_counter()
            for request, decoded in zip(requests, plain, strict=True):
                sample = outputs[request.request_id].outputs[0]
                if (sample.token_ids, sample.nfe) != (decoded.token_ids, decoded.nfe):
                    raise RuntimeError(
                        f"the plain loop writes other tokens than request {request.request_id}"
                    )
            rates.append((len(jobs) / (ended - middle), len(jobs) / (middle - started)))
            steadiness.look()
    return {
        "num_prompts": num_prompts,
        "num_cells": num_cells,
        "num_samples": len(jobs),
        **repeated.rate_figures(rates),
    }


def cells_of(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        str(result["num_prompts"]),
        str(result["num_cells"]),
        str(result["num_samples"]),
        *repeated.rate_cells(result),
    ]


def main() -> None:
    def every(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
        return [measure(NUM_PROMPTS, repetitions, steadiness)]

    repeated.run(__doc__, HEADER, cells_of, every)


if __name__ == "__main__":
    main()
