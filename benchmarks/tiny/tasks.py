"""The tiny model's tasks: problems whose answers can be checked.

A task draws problems with a seeded generator and judges answers. Numpy only: the trainer, the evaluation, the
demo and the tests all draw from here. The tokens of an answer depend on each other (a cell fixes its row,
column and box, a digit needs the carry from its right), so a decoder that commits too many of them at once
writes answers that break the rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

BLANK = "."
ANSWER_MARK = "="  # ends a prompt; the chat template adds it after the user's message

Problems: TypeAlias = tuple[list[str], list[str]]
"""Prompts of equal length, and one right answer each."""


class Task(ABC):
    """What the trainer and the evaluation ask of a task."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def answer_len(self) -> int:
        """Tokens of the longest answer, without the one that ends it."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, count: int) -> Problems:
        """Problems to train on."""

    @abstractmethod
    def held_out(self, rng: np.random.Generator, count: int) -> Problems:
        """Problems to evaluate on: the hardest, or such as `sample` never draws."""

    @abstractmethod
    def score(self, prompt: str, answer: str) -> float:
        """How good an answer is, from 0 to 1."""


class Puzzle(Task):
    """A task whose answers are right or wrong."""

    @abstractmethod
    def is_correct(self, prompt: str, answer: str) -> bool: ...

    @abstractmethod
    def valid_answers(self, prompt: str) -> list[str]:
        """All right answers."""

    def score(self, prompt: str, answer: str) -> float:
        return float(self.is_correct(prompt, answer))


@dataclass(frozen=True)
class Sudoku(Puzzle):
    """Sudoku of `size` x `size` cells with boxes of `box_height` x `box_width`, written row by row without
    separators.

    A prompt is the puzzle with `.` for each empty cell, then `=`; the answer is the filled grid. Any
    completion that keeps the givens and the rules counts (a puzzle may have several).
    """

    size: int
    box_height: int
    box_width: int
    pool_len: int  # random grids that the symmetries are applied to

    @property
    def name(self) -> str:
        return f"sudoku{self.size}x{self.size}"

    @property
    def answer_len(self) -> int:
        return self.size * self.size

    @property
    def max_blanks(self) -> int:
        """Blank cells of the hardest problems drawn (half of 6x6, 9 of 16 in 4x4)."""
        return self.answer_len // 2 + (1 if self.size == 4 else 0)

    @cached_property
    def _pool(self) -> np.ndarray:
        rng = np.random.default_rng(self.size)
        return np.stack([self._random_grid(rng) for _ in range(self.pool_len)])

    def _random_grid(self, rng: np.random.Generator) -> np.ndarray:
        n = self.size
        grid = np.zeros((n, n), dtype=np.int8)

        def allowed(row: int, col: int) -> np.ndarray:
            top, left = row - row % self.box_height, col - col % self.box_width
            box = grid[top : top + self.box_height, left : left + self.box_width]
            used = np.concatenate([grid[row], grid[:, col], box.ravel()])
            return np.setdiff1d(np.arange(1, n + 1), used)

        def fill(cell: int) -> bool:
            if cell == n * n:
                return True
            row, col = divmod(cell, n)
            for digit in rng.permutation(allowed(row, col)):
                grid[row, col] = digit
                if fill(cell + 1):
                    return True
            grid[row, col] = 0
            return False

        fill(0)
        return grid

    def solutions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Filled grids [count, size, size]: random grids of the pool under random symmetries of the rules."""
        n = self.size
        grids = self._pool[rng.integers(self.pool_len, size=count)]
        rows = _shuffled_lines(rng, count, n, self.box_height)
        cols = _shuffled_lines(rng, count, n, self.box_width)
        grids = np.take_along_axis(grids, rows[:, :, None], axis=1)
        grids = np.take_along_axis(grids, cols[:, None, :], axis=2)
        relabel = rng.permuted(np.tile(np.arange(1, n + 1, dtype=np.int8), (count, 1)), axis=1)
        return np.take_along_axis(relabel, grids.reshape(count, -1).astype(np.int64) - 1, axis=1).reshape(
            count, n, n
        )

    def sample(self, rng: np.random.Generator, count: int, blanks: int | None = None) -> Problems:
        """Prompts and one answer each; `blanks` empty cells, or 2/3 of `max_blanks` up to all of them."""
        solutions = self.solutions(rng, count).reshape(count, -1)
        num_blanks = (
            np.full(count, blanks)
            if blanks is not None
            else rng.integers(self.max_blanks * 2 // 3, self.max_blanks + 1, size=count)
        )
        order = np.argsort(rng.random((count, self.answer_len)), axis=1).argsort(axis=1)
        answers = ["".join(map(str, row)) for row in solutions]
        prompts = [
            "".join(BLANK if hidden else digit for digit, hidden in zip(answer, row < k, strict=True))
            + ANSWER_MARK
            for answer, row, k in zip(answers, order, num_blanks, strict=True)
        ]
        return prompts, answers

    def held_out(self, rng: np.random.Generator, count: int) -> Problems:
        return self.sample(rng, count, blanks=self.max_blanks)

    def is_correct(self, prompt: str, answer: str) -> bool:
        """Whether `answer` keeps the givens and every row, column and box holds each digit once."""
        puzzle = prompt.removesuffix(ANSWER_MARK)
        n = self.size
        if len(answer) != self.answer_len or any(c not in "123456789"[:n] for c in answer):
            return False
        if any(given not in (BLANK, cell) for given, cell in zip(puzzle, answer, strict=True)):
            return False
        grid = np.array([int(c) for c in answer]).reshape(n, n)
        boxes = grid.reshape(n // self.box_height, self.box_height, n // self.box_width, self.box_width)
        units = np.concatenate([grid, grid.T, boxes.transpose(0, 2, 1, 3).reshape(n, n)])
        return bool((np.sort(units, axis=1) == np.arange(1, n + 1)).all())

    def valid_answers(self, prompt: str) -> list[str]:
        cells = [0 if cell == BLANK else int(cell) for cell in prompt.removesuffix(ANSWER_MARK)]
        found: list[str] = []

        def fill() -> None:
            """Fills the empty cell with the fewest candidates in all ways, and the others after it."""
            empty = [cell for cell, digit in enumerate(cells) if not digit]
            if not empty:
                found.append("".join(map(str, cells)))
                return
            options = {cell: self._candidates(cells, cell) for cell in empty}
            cell = min(empty, key=lambda own: len(options[own]))
            for digit in options[cell]:
                cells[cell] = digit
                fill()
            cells[cell] = 0

        fill()
        return found

    def _candidates(self, cells: list[int], cell: int) -> list[int]:
        """The digits that an empty cell may hold beside those of its row, column and box."""
        used = {cells[other] for other in self._neighbours[cell]}
        return [digit for digit in range(1, self.size + 1) if digit not in used]

    @cached_property
    def _neighbours(self) -> list[list[int]]:
        """For each cell, the others of its row, column and box."""
        n = self.size

        def units(cell: int) -> tuple[tuple[int, int], ...]:
            row, col = divmod(cell, n)
            return (0, row), (1, col), (2, row // self.box_height * n + col // self.box_width)

        return [
            [other for other in range(n * n) if other != cell and set(units(cell)) & set(units(other))]
            for cell in range(n * n)
        ]


def _shuffled_lines(rng: np.random.Generator, count: int, n: int, group: int) -> np.ndarray:
    """Permutations [count, n] of rows or columns that keep groups of `group` adjacent lines together."""
    lines = np.tile(np.arange(n).reshape(n // group, group), (count, 1, 1))
    lines = rng.permuted(lines, axis=2)
    order = np.argsort(rng.random((count, n // group)), axis=1)
    return np.take_along_axis(lines, order[:, :, None], axis=1).reshape(count, n)


@dataclass(frozen=True)
class Addition(Puzzle):
    """Two numbers of `digits` digits, `123+456=`, and their sum `0579`: zeros in front make lengths equal.

    Every 17th pair of numbers is never trained on; those are the held-out problems.
    """

    digits: int

    @property
    def name(self) -> str:
        return f"addition{self.digits}"

    @property
    def answer_len(self) -> int:
        return self.digits + 1

    def sample(self, rng: np.random.Generator, count: int) -> Problems:
        pairs = rng.integers(10 ** (2 * self.digits), size=count)
        return self._problems(pairs + (pairs % 17 == 0))

    def held_out(self, rng: np.random.Generator, count: int) -> Problems:
        return self._problems(rng.integers(-(-(10 ** (2 * self.digits)) // 17), size=count) * 17)

    def _problems(self, pairs: np.ndarray) -> Problems:
        numbers = [divmod(int(pair), 10**self.digits) for pair in pairs]
        prompts = [f"{a:0{self.digits}}+{b:0{self.digits}}{ANSWER_MARK}" for a, b in numbers]
        return prompts, [f"{a + b:0{self.answer_len}}" for a, b in numbers]

    def is_correct(self, prompt: str, answer: str) -> bool:
        return [answer] == self.valid_answers(prompt)

    def valid_answers(self, prompt: str) -> list[str]:
        a, b = prompt.removesuffix(ANSWER_MARK).split("+")
        return [f"{int(a) + int(b):0{self.answer_len}}"]


SUDOKU_4X4 = Sudoku(size=4, box_height=2, box_width=2, pool_len=200)
SUDOKU_6X6 = Sudoku(size=6, box_height=2, box_width=3, pool_len=1000)
ADDITION = Addition(digits=3)
PUZZLES = {puzzle.name: puzzle for puzzle in (SUDOKU_4X4, SUDOKU_6X6, ADDITION)}
