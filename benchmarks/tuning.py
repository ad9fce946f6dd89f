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
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from rich.console import Console
from rich.table import Table

from remask import LLM, SamplingParams
from remask.benchmarks.environment import environment_stamp, unfinished
from remask.benchmarks.study.tasks import STUDY_TASKS, StudyTask
from remask.benchmarks.study.tune import accuracy_interval
from remask.benchmarks.throughput import write_report

STUDY = Path("benchmarks/results/study")  # of a checkout
TASKS = ("sudoku6x6", "sudoku4x4", "addition3")
BUDGETS = (3.0, 6.0, 20.0)
START = "from remask.cli import main; main()"
TUNING_SEED, JUDGING_SEED = 1001, 1002  # the study's grids have others
HEADER = (
    "task", "forwards at most", "tuned", "accuracy", "forwards", "grid's best", "accuracy", "forwards",
    "difference in points (95 %)", "minutes",
)  # fmt: skip


class Setting(NamedTuple):
    """Parameters, and how they are called in the table."""

    name: str
    params: SamplingParams


def tune(task: StudyTask, budget: float, num_rows: int, minutes: float) -> tuple[Setting, float]:
    """The settings that the command recommends, and the minutes that it took.

    Raises:
        RuntimeError: the command fails, or too few problems have one answer.
    """
    with tempfile.TemporaryDirectory() as name:
        rows, preset = Path(name) / "rows.jsonl", Path(name) / "tuned.toml"
        problems = [
            {"prompt": text, "answer": answers[0]}
            for text in task.texts(TUNING_SEED, 2 * num_rows)
            if len(answers := task.valid_answers(text)) == 1  # a row has one
        ]
        if len(problems) < num_rows:
            raise RuntimeError(f"{len(problems)} problems of {2 * num_rows} have one answer")
        rows.write_text("\n".join(map(json.dumps, problems[:num_rows])), encoding="utf-8")
        command = [sys.executable, "-c", START, "study", "tune", "--model", "tiny", "--tasks", rows]
        command += ["--max-forwards", budget, "--minutes", minutes, "--output", preset]
        started = time.monotonic()
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        taken = (time.monotonic() - started) / 60
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        params = SamplingParams.preset(str(preset), max_tokens=task.canvas_len)
    return _setting(params), taken


def best_cell(study: Path, task: str, budget: float) -> Setting | None:
    """The grid's best; None: every cell has more forwards."""
    table = pyarrow.parquet.read_table(study / "cells.parquet").to_pylist()
    cells = [
        cell
        for cell in table
        if cell["task"] == task
        and cell["temperature"] == 0
        and cell["arm"] != "exact"
        and cell["nfe"] <= budget
    ]
    if not cells:
        return None
    cell = max(cells, key=lambda cell: (cell["score"], -cell["nfe"]))
    canvas_len = STUDY_TASKS[task].canvas_len
    return _setting(
        SamplingParams(
            max_tokens=canvas_len,
            block_length=cell["block_length"] or canvas_len,
            unmask=cell["unmask"],
            remask=cell["remask"],
        )
    )


def judge(llm: LLM, task: StudyTask, params: SamplingParams, count: int) -> tuple[list[float], list[int]]:
    """Scores and forwards on the judging problems."""
    texts = task.texts(JUDGING_SEED, count)
    outputs = llm.generate(task.prompts(llm, texts), params, use_tqdm=False)
    scores = [task.score(text, out.outputs[0].text or "") for text, out in zip(texts, outputs, strict=True)]
    return scores, [output.outputs[0].nfe for output in outputs]


def measure(
    study: Path, tasks: Sequence[str], budgets: Sequence[float], num_rows: int, minutes: float, count: int
) -> Iterator[dict[str, Any]]:
    """A result of each task and budget."""
    for name in tasks:
        task = STUDY_TASKS[name]
        for budget in budgets:
            tuned, taken = tune(task, budget, num_rows, minutes)
            best = best_cell(study, name, budget)
            with LLM("tiny", dtype="float32") as llm:
                own = judge(llm, task, tuned.params, count)
                base = judge(llm, task, best.params, count) if best is not None else None
            result: dict[str, Any] = {"task": name, "max_forwards": budget, "minutes": round(taken, 2)}
            result["tuned"] = _figures(tuned, own)
            if best is not None and base is not None:
                result["grid"] = _figures(best, base)
                difference = 100 * (np.array(own[0]) - np.array(base[0]))
                result["points"] = [
                    round(value, 2) for value in (float(difference.mean()), *accuracy_interval(difference))
                ]
            yield result


def cells(result: dict[str, Any]) -> list[str]:
    """A result's line of the table."""
    grid = result.get("grid")
    found = [result["task"], f"{result['max_forwards']:g}", *_cells_of(result["tuned"])]
    if grid is None:
        found += ["no cell", "", "", ""]
    else:
        points, low, high = result["points"]
        found += [*_cells_of(grid), f"{points:+.1f} ({low:+.1f} to {high:+.1f})"]
    return [*found, f"{result['minutes']:.1f}"]


def _setting(params: SamplingParams) -> Setting:
    unmask = str(params.unmask)
    policies = unmask if params.remask is None else f"{unmask} + {params.remask}"
    block = "whole" if (params.block_length or 0) >= params.max_tokens else str(params.block_length)
    return Setting(f"{policies}, block {block}", params)


def _figures(setting: Setting, judged: tuple[list[float], list[int]]) -> dict[str, Any]:
    scores, nfe = judged
    return {
        "setting": setting.name,
        "accuracy": round(float(np.mean(scores)), 4),
        "forwards": round(float(np.mean(nfe)), 2),
    }


def _cells_of(figures: dict[str, Any]) -> list[str]:
    return [figures["setting"], f"{100 * figures['accuracy']:.1f} %", f"{figures['forwards']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=STUDY, help="directory of the study")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--rows", type=int, default=150, help="problems of a task file")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a tuning")
    parser.add_argument("--count", type=int, default=1000, help="problems that judge")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = (args.study, args.tasks, args.budgets, args.rows, args.minutes, args.count)
    report: dict[str, Any] = {
        "environment": environment_stamp(),
        "rows": args.rows,
        "minutes": args.minutes,
        "judging_problems": args.count,
        "results": [],
    }
    table, asked = Table(*HEADER), len(args.tasks) * len(args.budgets)
    for result in measure(*settings):
        report["results"].append(result)
        report["notes"] = unfinished(len(report["results"]), asked, "tunings")
        table.add_row(*cells(result))
        if args.output is not None:
            write_report(report, args.output)
    Console().print(table)


if __name__ == "__main__":
    main()
