"""The tiny model's tasks: puzzles whose answers can be checked.

A task draws problems with a seeded generator and judges answers. Numpy only: the trainer, the evaluation, the
demo and the tests all draw from here. The tokens of an answer depend on each other (a cell fixes its row,
column and box), so a decoder that commits too many of them at once writes grids that break the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLANK = "."
ANSWER_MARK = "="  # ends a prompt; the chat template adds it after the user's message


@dataclass(frozen=True)
class Sudoku:
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
    def num_cells(self) -> int:
        return self.size * self.size

    @property
    def max_blanks(self) -> int:
        """Blank cells of the hardest problems drawn (half of 6x6, 9 of 16 in 4x4)."""
        return self.num_cells // 2 + (1 if self.size == 4 else 0)

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

    def sample(
        self, rng: np.random.Generator, count: int, blanks: int | None = None
    ) -> tuple[list[str], list[str]]:
        """Prompts and one answer each; `blanks` empty cells, or 2/3 of `max_blanks` up to all of them."""
        solutions = self.solutions(rng, count).reshape(count, -1)
        num_blanks = (
            np.full(count, blanks)
            if blanks is not None
            else rng.integers(self.max_blanks * 2 // 3, self.max_blanks + 1, size=count)
        )
        order = np.argsort(rng.random((count, self.num_cells)), axis=1).argsort(axis=1)
        answers = ["".join(map(str, row)) for row in solutions]
        prompts = [
            "".join(BLANK if hidden else digit for digit, hidden in zip(answer, row < k, strict=True))
            + ANSWER_MARK
            for answer, row, k in zip(answers, order, num_blanks, strict=True)
        ]
        return prompts, answers

    def is_correct(self, prompt: str, answer: str) -> bool:
        """Whether `answer` keeps the givens and every row, column and box holds each digit once."""
        puzzle = prompt.removesuffix(ANSWER_MARK)
        n = self.size
        if len(answer) != self.num_cells or any(c not in "123456789"[:n] for c in answer):
            return False
        if any(given not in (BLANK, cell) for given, cell in zip(puzzle, answer, strict=True)):
            return False
        grid = np.array([int(c) for c in answer]).reshape(n, n)
        boxes = grid.reshape(n // self.box_height, self.box_height, n // self.box_width, self.box_width)
        units = np.concatenate([grid, grid.T, boxes.transpose(0, 2, 1, 3).reshape(n, n)])
        return bool((np.sort(units, axis=1) == np.arange(1, n + 1)).all())


def _shuffled_lines(rng: np.random.Generator, count: int, n: int, group: int) -> np.ndarray:
    """Permutations [count, n] of rows or columns that keep groups of `group` adjacent lines together."""
    lines = np.tile(np.arange(n).reshape(n // group, group), (count, 1, 1))
    lines = rng.permuted(lines, axis=2)
    order = np.argsort(rng.random((count, n // group)), axis=1)
    return np.take_along_axis(lines, order[:, :, None], axis=1).reshape(count, n)


SUDOKU_4X4 = Sudoku(size=4, box_height=2, box_width=2, pool_len=200)
SUDOKU_6X6 = Sudoku(size=6, box_height=2, box_width=3, pool_len=1000)
TASKS = {task.name: task for task in (SUDOKU_4X4, SUDOKU_6X6)}
