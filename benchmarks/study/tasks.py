"""The tasks of the study: prompts whose answers can be judged, in a canvas of fixed length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from remask import LLM, InvalidRequest
from remask.benchmarks.tiny.policies import ROOM
from remask.benchmarks.tiny.tasks import PUZZLES, SUDOKU_4X4, SUDOKU_6X6, Puzzle, Sudoku, Task
from remask.benchmarks.tiny.text import TEXT
from remask.scheduler.errors import did_you_mean

STUDY_SEED = 2**31 + 7  # beside the seed of a grid; training and evaluation draw from other seeds
SEVERAL = 4  # right answers that a prompt of an open puzzle has at least


class StudyTask(ABC):
    """What the study asks of a task.

    Attributes:
        is_chat: whether a prompt is the message of a user.
    """

    is_chat: bool = False

    @property
    def is_puzzle(self) -> bool:
        """Whether an answer is right, with a score of 1, or not; if False, a text has a score."""
        return True

    @property
    @abstractmethod
    def canvas_len(self) -> int:
        """Tokens of a canvas."""

    def canvas_of(self, text: str) -> int:
        """Tokens of the canvas of one prompt, at most `canvas_len`."""
        return self.canvas_len

    @property
    def num_prompts(self) -> int | None:
        """Number of its prompts; None: as many as are asked for."""
        return None

    @abstractmethod
    def texts(self, seed: int, count: int) -> list[str]:
        """The first `count` prompts for the seed of a grid; more prompts leave the first ones as they are.
        They differ from each other."""

    @abstractmethod
    def score(self, prompt: str, answer: str) -> float:
        """How good an answer to one of `texts` is, from 0 to 1.

        Raises:
            CheckFailed: the answer cannot be judged.
        """

    def valid_answers(self, prompt: str) -> tuple[str, ...]:
        """All right answers, ascending; empty if they are unknown."""
        return ()

    def prompts(self, llm: LLM, texts: list[str]) -> list[Any]:
        """Prompts for an engine; those of a chat go through the model's template if it has one."""
        if not (self.is_chat and llm.tokenizer is not None and llm.tokenizer.chat_template):
            return list(texts)
        return llm.engine.intake.chat_prompts([[{"role": "user", "content": text}] for text in texts])


@dataclass(frozen=True)
class TinyTask(StudyTask):
    """A task of the tiny model, on held-out problems.

    Attributes:
        task: draws problems and judges answers.
    """

    task: Task

    @property
    def canvas_len(self) -> int:
        return self.task.answer_len + ROOM

    @property
    def is_puzzle(self) -> bool:
        return isinstance(self.task, Puzzle)

    def texts(self, seed: int, count: int) -> list[str]:
        return [
            self._text(np.random.default_rng([STUDY_SEED, seed, self.task.answer_len, index]))
            for index in range(count)
        ]

    def _text(self, rng: np.random.Generator) -> str:
        (prompt,), _ = self.task.held_out(rng, 1)
        return prompt

    def score(self, prompt: str, answer: str) -> float:
        return self.task.score(prompt, answer)

    def valid_answers(self, prompt: str) -> tuple[str, ...]:
        return _valid_answers(self.task, prompt) if isinstance(self.task, Puzzle) else ()


@dataclass(frozen=True)
class OpenSudoku(TinyTask):
    """Sudoku whose puzzles have at least `SEVERAL` right grids.

    Attributes:
        blanks: empty cells.
    """

    task: Sudoku
    blanks: int

    def _text(self, rng: np.random.Generator) -> str:
        while True:
            (prompt,), _ = self.task.sample(rng, 1, blanks=self.blanks)
            if len(self.valid_answers(prompt)) >= SEVERAL:
                return prompt


@cache
def _valid_answers(puzzle: Puzzle, prompt: str) -> tuple[str, ...]:
    return tuple(sorted(puzzle.valid_answers(prompt)))


@dataclass(frozen=True)
class GymTask(StudyTask):
    """A dataset of reasoning-gym, which generates problems and judges answers.

    Attributes:
        dataset: its name there.
        max_tokens: tokens of a canvas.
        options: settings of the dataset.

    Raises:
        InvalidRequest: the package is not installed, or the dataset or its settings are unknown.
    """

    dataset: str
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    is_chat = True

    def __post_init__(self) -> None:
        if find_spec("reasoning_gym") is None:
            problem = "is not installed; run `pip install 'remask[study]'`"
            raise InvalidRequest("reasoning_gym", self.dataset, problem)
        from reasoning_gym.factory import DATASETS

        if self.dataset not in DATASETS:
            hint = did_you_mean(self.dataset, list(DATASETS))
            raise InvalidRequest("reasoning_gym", self.dataset, f"is no dataset of reasoning-gym; {hint}")
        try:
            self._problems(0, 1)
        except (TypeError, ValueError, AssertionError) as error:
            raise InvalidRequest("options", self.options, f"{self.dataset} refuses them: {error}") from None

    @property
    def canvas_len(self) -> int:
        return self.max_tokens

    @cached_property
    def _entries(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """By prompt: the dataset that judges its answers, and its entry there."""
        return {}

    def texts(self, seed: int, count: int) -> list[str]:
        dataset = self._problems(seed, count)
        entries = [dataset[index] for index in range(count)]
        self._entries.update((entry["question"], (dataset, entry)) for entry in entries)
        return [entry["question"] for entry in entries]

    def score(self, prompt: str, answer: str) -> float:
        dataset, entry = self._entries[prompt]
        return float(dataset.score_answer(answer, entry))

    def _problems(self, seed: int, count: int) -> Any:
        from reasoning_gym import create_dataset

        return create_dataset(self.dataset, size=count, seed=seed, **self.options)


STUDY_TASKS: dict[str, StudyTask] = {
    **{name: TinyTask(task) for name, task in {**PUZZLES, TEXT.name: TEXT}.items()},
    "sudoku4x4_open": OpenSudoku(SUDOKU_4X4, blanks=12),
    "sudoku6x6_open": OpenSudoku(SUDOKU_6X6, blanks=24),
}
