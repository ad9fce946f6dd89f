"""The tasks of the study: prompts with answers that can be judged, in a canvas of fixed length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from remask.benchmarks.tiny.policies import ROOM
from remask.benchmarks.tiny.tasks import PUZZLES, Puzzle, Task
from remask.benchmarks.tiny.text import TEXT

STUDY_SEED = 2**31 + 7  # beside the seed of a grid; training and evaluation draw from other seeds


@dataclass(frozen=True)
class StudyTask:
    """A task of the tiny model.

    Attributes:
        task: draws problems and judges answers.
    """

    task: Task

    @property
    def canvas_len(self) -> int:
        """Tokens of a canvas: the longest answer, and room for the token that ends it."""
        return self.task.answer_len + ROOM

    @property
    def is_puzzle(self) -> bool:
        """Whether answers are right or wrong; if not, they have a score."""
        return isinstance(self.task, Puzzle)

    def prompts(self, seed: int, count: int) -> list[str]:
        """The first `count` prompts for the seed of a grid; more prompts leave the first ones as they are."""
        return [self._prompt(seed, index) for index in range(count)]

    def _prompt(self, seed: int, index: int) -> str:
        rng = np.random.default_rng([STUDY_SEED, seed, self.task.answer_len, index])
        (prompt,), _ = self.task.held_out(rng, 1)
        return prompt

    def score(self, prompt: str, answer: str) -> float:
        """How good an answer is, from 0 to 1."""
        return self.task.score(prompt, answer)

    def valid_answers(self, prompt: str) -> tuple[str, ...]:
        """All right answers, ascending; empty if the task is no puzzle."""
        return _valid_answers(self.task, prompt) if isinstance(self.task, Puzzle) else ()


@cache
def _valid_answers(puzzle: Puzzle, prompt: str) -> tuple[str, ...]:
    return tuple(sorted(puzzle.valid_answers(prompt)))


STUDY_TASKS = {name: StudyTask(task) for name, task in {**PUZZLES, TEXT.name: TEXT}.items()}
