"""What reused keys cost in quality: exact decoding beside `reuse` on the tiny model's held-out problems.

    python -m remask.benchmarks.tiny.reuse_quality --count 400 --output benchmarks/results/reuse_quality.json

Blocks have 8 and 20 slots where the canvas is longer, and are the whole canvas where it is not. Every arm
decodes the same problems, so that differences to exact decoding are paired: the standard error is that of the
mean difference. Rows are those of all forwards, as the engine counts them. Times are not reported. The text
task needs its corpus (`pip install 'remask[train]'`); without it, `--tasks` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from remask import LLM, SamplingParams
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.tiny.evaluate import TASKS, problems
from remask.benchmarks.tiny.policies import ROOM
from remask.benchmarks.tiny.tasks import Task

UNMASK, BLOCK_LENS, REFRESH = "threshold:0.9", (8, 20), (None, 8, 4, 2)
EXACT: dict[str, Any] = {"reuse": None}
ARMS = [EXACT, *({"reuse": reuse, "refresh": n} for reuse in ("prefix", "both") for n in REFRESH)]
HEADER = ("task", "block", "reuse", "refresh", "score", "less exact", "NFE", "full", "rows of exact")


def measure(llm: LLM, task: Task, count: int) -> Iterator[dict[str, Any]]:
    """A result of each block length and arm."""
    prompts, canvas_len = problems(task, count), task.answer_len + ROOM
    for block_len in dict.fromkeys(min(length, canvas_len) for length in BLOCK_LENS):
        exact: list[float] = []
        exact_rows = 0.0
        for arm in ARMS:
            params = SamplingParams(max_tokens=canvas_len, block_length=block_len, unmask=UNMASK, **arm)
            samples = [output.outputs[0] for output in llm.generate(prompts, params)]
            scores = [task.score(p, s.text or "") for p, s in zip(prompts, samples, strict=True)]
            num_rows = float(np.mean([sample.num_query_rows for sample in samples]))
            if arm is EXACT:
                exact, exact_rows = scores, num_rows
            differences = np.subtract(scores, exact)
            yield {
                "task": task.name,
                "block_length": block_len,
                "is_whole": block_len == canvas_len,
                "refresh": None,
                **arm,
                "count": count,
                "score": round(float(np.mean(scores)), 4),
                "difference": round(float(differences.mean()), 4),
                "standard_error": round(float(differences.std(ddof=1) / count**0.5), 4),
                "nfe": round(float(np.mean([sample.nfe for sample in samples])), 2),
                "full_forwards": round(float(np.mean([sample.num_full_forwards for sample in samples])), 2),
                "rows_of_exact": round(num_rows / exact_rows, 3),
            }


def cells(result: dict[str, Any]) -> list[str]:
    """A result's line of the table."""
    is_exact = result["reuse"] is None
    return [
        result["task"],
        "whole" if result["is_whole"] else str(result["block_length"]),
        "" if is_exact else f"`{result['reuse']}`",
        "" if result["refresh"] is None else str(result["refresh"]),
        f"{100 * result['score']:.1f} %",
        "" if is_exact else f"{100 * result['difference']:+.1f} ± {100 * result['standard_error']:.1f}",
        f"{result['nfe']:.1f}",
        f"{result['full_forwards']:.1f}",
        f"{result['rows_of_exact']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    environment, results = environment_stamp(), list[dict[str, Any]]()
    with LLM("tiny", dtype="float32", device="cpu") as llm:
        for name in args.tasks:
            for result in measure(llm, TASKS[name], args.count):
                results.append(result)
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
    args.output.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
