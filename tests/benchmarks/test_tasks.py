"""The tiny model's tasks: what counts as a solution, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from remask.benchmarks.tiny.evaluate import TASKS
from remask.benchmarks.tiny.tasks import (
    ADDITION,
    BLANK,
    PUZZLES,
    SUDOKU_4X4,
    SUDOKU_6X6,
    Puzzle,
    Sudoku,
    Task,
)
from remask.benchmarks.tiny.text import TEXT, Sentences, words_of

GRID = "1234341221434321"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("drawn", ["sample", "held_out"])
def test_answers_solve_their_prompts_and_fit(task: Task, drawn: str) -> None:
    prompts, answers = getattr(task, drawn)(np.random.default_rng(1), 200)
    assert len({len(prompt) for prompt in prompts}) == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        assert task.score(prompt, answer) == 1
        assert len(answer.encode()) <= task.answer_len
    assert len(set(answers)) > 100


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_same_seed_draws_the_same_problems(task: Task) -> None:
    first, second, other = (task.sample(np.random.default_rng(seed), 20) for seed in (7, 7, 8))
    assert first == second != other


@pytest.mark.parametrize("puzzle", PUZZLES.values(), ids=PUZZLES)
def test_another_problems_answer_does_not_count(puzzle: Puzzle) -> None:
    prompts, answers = puzzle.held_out(np.random.default_rng(2), 50)
    assert not any(puzzle.is_correct(p, a) for p, a in zip(prompts, answers[1:] + answers[:1], strict=True))


@pytest.mark.parametrize("sudoku", [SUDOKU_4X4, SUDOKU_6X6])
def test_held_out_sudokus_are_the_hardest(sudoku: Sudoku) -> None:
    prompts, _ = sudoku.held_out(np.random.default_rng(1), 50)
    assert {prompt.count(BLANK) for prompt in prompts} == {sudoku.max_blanks}
    prompts, _ = sudoku.sample(np.random.default_rng(1), 50, blanks=3)
    assert {prompt.count(BLANK) for prompt in prompts} == {3}


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


def test_a_sum_has_zeros_in_front() -> None:
    assert ADDITION.is_correct("007+035=", "0042")
    assert not ADDITION.is_correct("007+035=", "42")
    assert ADDITION.is_correct("999+999=", "1998")


def test_held_out_sums_are_never_drawn_for_training() -> None:
    drawn, held_out = (
        set(draw(np.random.default_rng(3), 50_000)[0]) for draw in (ADDITION.sample, ADDITION.held_out)
    )
    assert len(drawn) > 45_000
    assert not drawn & held_out


def test_held_out_text_is_never_drawn_for_training() -> None:
    def lines(draw) -> set[str]:
        prompts, answers = draw(np.random.default_rng(3), 20_000)
        return {prompt + answer for prompt, answer in zip(prompts, answers, strict=True)}

    drawn, held_out = lines(TEXT.sample), lines(TEXT.held_out)
    # Scripture repeats itself: the same words may stand in another place, too.
    assert len(drawn & held_out) < 0.01 * len(held_out)


def test_misspelt_words_do_not_count() -> None:
    assert TEXT.score("", "And the king said unto him.") == 1
    assert TEXT.score("", "And the kxng said unto hmm.") == pytest.approx(4 / 6)
    assert TEXT.score("", "...") == 0
    assert words_of("The LORD's house, o'er all.") == ["the", "lord's", "house", "o'er", "all"]


def test_a_missing_corpus_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("remask.benchmarks.tiny.text.resources.files", missing)
    with pytest.raises(ModuleNotFoundError, match=r"remask\[train\]"):
        Sentences().sample(np.random.default_rng(0), 1)
