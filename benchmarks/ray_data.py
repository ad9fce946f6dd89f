"""What Ray Data costs: a dataset through actors with engines against engines in processes of their own.

    python -m remask.benchmarks.ray_data --output benchmarks/results/ray_data.json

2,000 sudokus of 6x6 cells for the tiny model under `threshold:0.9`, one thread an engine. *Ray Data* is
measured from the first rows that come out, when its actors are warm, to the last. The *engines* are warm, and
each serves its share with one call of `LLM.generate`, side by side if there are two. Both run in turn in
every repetition, and ratios are taken within it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from remask import SamplingParams
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.ray_workers import DTYPE, SideBySide
from remask.benchmarks.throughput import find_model, format_spread, spread
from remask.benchmarks.tiny.tasks import PUZZLES
from remask.benchmarks.workloads import Job
from remask.ray import RemaskProcessorConfig, build_processor
from remask.text import load_tokenizer

MODEL, TASK, NUM_ROWS, SEED = "tiny", "sudoku6x6", 2000, 11
HEADER = ("actors", "rows/s through Ray Data", "rows/s of as many engines", "times as fast (min to max)")


def sudokus(count: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts, and the parameters of all of them."""
    puzzle, tokenizer = PUZZLES[TASK], load_tokenizer(find_model(MODEL)[0], required=True)
    assert tokenizer is not None, "it is required"
    texts, _ = puzzle.held_out(np.random.default_rng(SEED), count)
    size = puzzle.answer_len
    return [tokenizer.encode(text) for text in texts], {
        "max_tokens": size,
        "block_length": size,
        "unmask": "threshold:0.9",
        "ignore_eos": True,
    }


def through_ray(prompts: Sequence[list[int]], params: dict[str, Any], num_actors: int) -> float:
    """Rows a second, from the first that come out to the last."""
    config = RemaskProcessorConfig(model=MODEL, engine_kwargs={"dtype": DTYPE}, concurrency=num_actors)
    rows = ray.data.from_items([{"prompt": prompt, "sampling_params": params} for prompt in prompts])
    moments, counts = [], []
    for batch in build_processor(config)(rows).iter_batches(batch_size=None, batch_format="pyarrow"):
        moments.append(time.perf_counter())
        counts.append(batch.num_rows)
        assert batch.column("error").null_count == batch.num_rows, "no row is refused"
    assert sum(counts) == len(prompts)
    return sum(counts[1:]) / (moments[-1] - moments[0])


def measure(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    """A result of one actor, and one of two."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    prompts, params = sudokus(NUM_ROWS)
    checked = SamplingParams(**params)
    results = []
    for num_engines in (1, 2):
        engines = SideBySide(num_engines, MODEL)
        jobs = [Job(prompt, checked) for prompt in prompts]
        engines.serve(jobs[: 64 * num_engines])
        pairs = []
        for _ in range(repetitions):
            ours = through_ray(prompts, params, num_engines)
            pairs.append((ours, NUM_ROWS / engines.serve(jobs)))
            steadiness.look()
        engines.close()
        results.append(
            {
                "actors": num_engines,
                "rows": NUM_ROWS,
                "rows_per_second": spread([ours for ours, _ in pairs]),
                "rows_per_second_in_process": spread([theirs for _, theirs in pairs]),
                "ratio": spread([ours / theirs for ours, theirs in pairs]),
            }
        )
    ray.shutdown()
    return results


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        str(result["actors"]),
        f"{result['rows_per_second']['median']:.0f}",
        f"{result['rows_per_second_in_process']['median']:.0f}",
        format_spread(result["ratio"]),
    ]


def main() -> None:
    repeated.run(__doc__, HEADER, cells, measure, repetitions=3)


if __name__ == "__main__":
    main()
