"""`remask study tune` against the default grid of the study: is what it recommends as good?

    python -m remask.benchmarks.tuning --output benchmarks/results/tuning.json

For each puzzle and each bound on the forwards, the command tunes on a file of 150 problems with one right
answer each, within 5 minutes. The *grid's best* is the greedy cell of the committed study with the best score
at no more forwards; the exact verifier, a control that computes a forward for each token, is left out. Both
settings then solve the same 1,000 problems, drawn with another seed, so that neither figure is one that the
setting was chosen by.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from rich.console import Console
from rich.table import Table

from remask import LLM, SamplingParams
from remask.benchmarks.environment import environment_stamp, unfinished
from remask.benchmarks.study.candidates import Candidate
from remask.benchmarks.study.tasks import STUDY_TASKS, StudyTask
from remask.benchmarks.study.tune import Result, accuracy_interval
from remask.benchmarks.throughput import write_report

STUDY = Path("benchmarks/results/study")  # of a checkout
TASKS = ("sudoku6x6", "sudoku4x4", "addition3")
BUDGETS = (3.0, 6.0, 20.0)
NUM_ROWS, MINUTES, NUM_JUDGING = 150, 5.0, 1000
START = "from remask.cli import main; main()"
TUNING_SEED, JUDGING_SEED = 1001, 1002  # the study's grids have others
HEADER = (
    "task", "forwards at most", "tuned", "accuracy", "forwards", "grid's best", "accuracy", "forwards",
    "difference in points (95 %)", "minutes",
)  # fmt: skip


def tune(task: StudyTask, budget: float) -> tuple[Candidate, float]:
    """The settings that the command recommends, and the minutes that it took.

    Raises:
        RuntimeError: the command fails, or too few problems have one answer.
    """
    with tempfile.TemporaryDirectory() as name:
        rows, preset = Path(name) / "rows.jsonl", Path(name) / "tuned.toml"
        problems = [
            {"prompt": text, "answer": answers[0]}
            for text in task.texts(TUNING_SEED, 2 * NUM_ROWS)
            if len(answers := task.valid_answers(text)) == 1  # a row has one
        ]
        if len(problems) < NUM_ROWS:
            raise RuntimeError(f"{len(problems)} problems of {2 * NUM_ROWS} have one answer")
        rows.write_text("\n".join(map(json.dumps, problems[:NUM_ROWS])), encoding="utf-8")
        command = [sys.executable, "-c", START, "study", "tune", "--model", "tiny", "--tasks", rows]
        command += ["--max-forwards", budget, "--minutes", MINUTES, "--output", preset]
        started = time.monotonic()
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        taken = (time.monotonic() - started) / 60
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        params = SamplingParams.preset(str(preset), max_tokens=task.canvas_len)
    block_length = params.block_length if (params.block_length or 0) < task.canvas_len else None
    remask = None if params.remask is None else str(params.remask)
    return Candidate(str(params.unmask), remask, block_length), taken


def best_cell(task: str, budget: float) -> Candidate | None:
    """The grid's best; None: every cell has more forwards."""
    cells = [
        cell
        for cell in pyarrow.parquet.read_table(STUDY / "cells.parquet").to_pylist()
        if cell["task"] == task
        and cell["temperature"] == 0
        and cell["arm"] != "exact"
        and cell["nfe"] <= budget
    ]
    if not cells:
        return None
    cell = max(cells, key=lambda cell: (cell["score"], -cell["nfe"]))
    return Candidate(cell["unmask"], cell["remask"], cell["block_length"])


def judge(llm: LLM, task: StudyTask, candidate: Candidate) -> Result:
    """A setting on the judging problems."""
    texts = task.texts(JUDGING_SEED, NUM_JUDGING)
    params = candidate.params(task.canvas_len)
    samples = [out.outputs[0] for out in llm.generate(task.prompts(llm, texts), params, use_tqdm=False)]
    scores = [task.score(text, sample.text or "") for text, sample in zip(texts, samples, strict=True)]
    return Result(candidate, np.array(scores, dtype=float), np.array([s.nfe for s in samples], dtype=float))


def measure(tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A result of each task and budget."""
    for name, budget in itertools.product(tasks, BUDGETS):
        task = STUDY_TASKS[name]
        tuned, taken = tune(task, budget)
        best = best_cell(name, budget)
        with LLM("tiny", dtype="float32") as llm:
            own = judge(llm, task, tuned)
            base = None if best is None else judge(llm, task, best)
        result: dict[str, Any] = {"task": name, "max_forwards": budget, "minutes": round(taken, 2)}
        result["tuned"] = _figures(own)
        if base is not None:
            result["grid"] = _figures(base)
            points = 100 * (own.scores - base.scores)
            result["points"] = [round(v, 2) for v in (float(points.mean()), *accuracy_interval(points))]
        yield result


def cells(result: dict[str, Any]) -> list[str]:
    """A result's line of the table."""
    found = [result["task"], f"{result['max_forwards']:g}", *_cells_of(result["tuned"])]
    if "grid" in result:
        points, low, high = result["points"]
        found += [*_cells_of(result["grid"]), f"{points:+.1f} ({low:+.1f} to {high:+.1f})"]
    else:
        found += ["no cell", "", "", ""]
    return [*found, f"{result['minutes']:.1f}"]


def _figures(result: Result) -> dict[str, Any]:
    return {
        "setting": str(result.candidate),
        "accuracy": round(result.accuracy, 4),
        "forwards": round(result.forwards, 2),
    }


def _cells_of(figures: dict[str, Any]) -> list[str]:
    return [figures["setting"], f"{100 * figures['accuracy']:.1f} %", f"{figures['forwards']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "environment": environment_stamp(),
        "rows": NUM_ROWS,
        "minutes": MINUTES,
        "judging_problems": NUM_JUDGING,
        "results": [],
    }
    table, asked = Table(*HEADER), len(args.tasks) * len(BUDGETS)
    for result in measure(args.tasks):
        report["results"].append(result)
        report["notes"] = unfinished(len(report["results"]), asked, "tunings")
        table.add_row(*cells(result))
        if args.output is not None:
            write_report(report, args.output)
    Console().print(table)


if __name__ == "__main__":
    main()
