"""The tiny model's tasks: what counts as a solution."""

from __future__ import annotations

import numpy as np
import pytest

from remask.benchmarks.tiny.tasks import BLANK, SUDOKU_4X4, TASKS, Sudoku

GRID = "1234341221434321"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("blanks", [None, 3])
def test_answers_solve_their_prompts(task: Sudoku, blanks: int | None) -> None:
    prompts, answers = task.sample(np.random.default_rng(1), 200, blanks)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert task.is_correct(prompt, answer)
        assert blanks is None or prompt.count(BLANK) == blanks
    assert len(set(answers)) > 100


def test_the_same_seed_draws_the_same_problems() -> None:
    first, second = (SUDOKU_4X4.sample(np.random.default_rng(7), 20) for _ in range(2))
    assert first == second


def test_any_valid_completion_counts() -> None:
    assert SUDOKU_4X4.is_correct("." * 16 + "=", GRID)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("1" + "." * 15, GRID[1:] + "1"),  # rotated: breaks the rules
        ("2" + "." * 15, GRID),  # changes a given
        ("." * 16, GRID[:-1]),  # too short
        ("." * 16, GRID + "1"),  # too long
        ("." * 16, GRID[:-1] + "5"),  # no such digit
        ("." * 16, GRID[:-1] + "x"),
        ("." * 16, "1234234134124123"),  # rows and columns are right, boxes are not
    ],
)
def test_what_breaks_a_rule_does_not_count(prompt: str, answer: str) -> None:
    assert not SUDOKU_4X4.is_correct(prompt + "=", answer)
