"""The first thing to see: the embedded model solves 6x6 sudokus under three policies, side by side.

    python -m remask.benchmarks.tiny.demo

Every policy gets the same puzzles, all of them at once; seconds are for the whole batch.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from remask import LLM, RequestOutput
from remask.benchmarks.tiny.policies import params
from remask.benchmarks.tiny.tasks import ANSWER_MARK, BLANK, SUDOKU_6X6

SHOWN = ("one token a step", "threshold 0.7", "WINO 0.7/0.9")
DEMO_SEED = 2**31 + 2
TASK = SUDOKU_6X6


def grid(puzzle: str, answer: str) -> Text:
    """The grid with box lines; cells filled in are green where the whole is right, else red."""
    right = TASK.is_correct(puzzle, answer)
    puzzle = puzzle.removesuffix(ANSWER_MARK)
    text = Text()
    for i, given in enumerate(puzzle):
        row, col = divmod(i, TASK.size)
        if col == 0 and row > 0:
            text.append("\n")
            if row % TASK.box_height == 0:
                text.append("------+------\n", style="dim")
        if col > 0 and col % TASK.box_width == 0:
            text.append("| ", style="dim")
        cell = answer[i] if i < len(answer) else " "
        text.append(f"{cell} ", style="bold" if given != BLANK else ("green" if right else "red"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=64, help="puzzles")
    parser.add_argument("--grids", type=int, default=2, help="puzzles to draw")
    args = parser.parse_args()
    if args.count < 1 or args.grids < 0:
        parser.error("--count must be at least 1 and --grids at least 0")
    console = Console()
    prompts, _ = TASK.held_out(np.random.default_rng(DEMO_SEED), args.count)
    title = f"{args.count} puzzles of 6x6 cells, half of them blank"
    table = Table("policy", "solved", "NFE", "tokens/forward", "seconds", title=title)
    outputs: dict[str, list[RequestOutput]] = {}
    with LLM(args.model) as llm:
        llm.generate(prompts[:1], params(SHOWN[0], TASK.answer_len))  # first-use costs stay out of the times
        for policy in SHOWN:
            started = time.perf_counter()
            outputs[policy] = llm.generate(prompts, params(policy, TASK.answer_len))
            seconds = time.perf_counter() - started
            samples = [output.outputs[0] for output in outputs[policy]]
            solved = sum(TASK.is_correct(p, s.text or "") for p, s in zip(prompts, samples, strict=True))
            table.add_row(
                policy,
                f"{solved}/{len(prompts)} = {solved / len(prompts):.0%}",
                f"{np.mean([s.nfe for s in samples]):.1f}",
                f"{np.mean([s.tokens_per_forward for s in samples]):.2f}",
                f"{seconds:.2f}",
            )
    texts = {policy: [out.outputs[0].text or "" for out in outputs[policy]] for policy in SHOWN}
    # Puzzles on which the policies differ come first: there is more to see in them.
    num_right = [sum(TASK.is_correct(p, texts[policy][i]) for policy in SHOWN) for i, p in enumerate(prompts)]
    by_interest = sorted(range(len(prompts)), key=lambda i: num_right[i] in (0, len(SHOWN)))
    for i in by_interest[: args.grids]:
        puzzle = Panel(grid(prompts[i], prompts[i].replace(BLANK, " ")), title="puzzle", expand=False)
        answers = [Panel(grid(prompts[i], texts[policy][i]), title=policy, expand=False) for policy in SHOWN]
        console.print(Columns([puzzle, *answers]))
    console.print("Filled-in cells are green where the grid keeps all rules and red where it does not.\n")
    console.print(table)


if __name__ == "__main__":
    main()
