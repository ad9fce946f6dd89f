"""A user's own task: a file of JSON lines with prompts and answers.

A row has `prompt` (text) or `messages`, `answer` (text or a number), and optionally `max_tokens`, the canvas
of the row, and `checker` (`remask.benchmarks.study.checkers`). Further fields are for checkers of the user's.
Rows with the same prompt and answer count once.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from remask import LLM, InvalidRequest
from remask.benchmarks.study.checkers import Checker, check_answer, checker_of
from remask.benchmarks.study.tasks import StudyTask
from remask.embedded import model_directory
from remask.text import load_tokenizer

DEFAULT_CHECKER = "exact"
ROOM = 4  # tokens of a canvas beside those of the longest answer
WRITES_THE_ANSWER = ("exact", "contains", "number", "multiple_choice")  # an answer must fit the canvas


class Row(NamedTuple):
    """A row of a task file.

    Attributes:
        line: its number, from 1.
        text: the prompt, or the messages as JSON; it names the row.
        messages: of a chat; None: the prompt is text.
        answer: the right answer.
        max_tokens: tokens of its canvas; None: as the task.
        checker: a name.
        fields: all fields of the row, with the answer as text.
    """

    line: int
    text: str
    messages: list[Any] | None
    answer: str
    max_tokens: int | None
    checker: str
    fields: dict[str, Any]


class FileTask(StudyTask):
    """The task of a file, which is read when it is first needed.

    Args:
        path: the file.
        model: directory of a checkpoint, or "tiny"; its tokenizer counts the tokens of the answers.
        max_tokens: tokens of the canvases of rows that do not say; None: those of the longest answer, and
            `ROOM` more.
        checker: of rows that do not say.
        allow_code: whether checkers of the user's may run.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        *,
        max_tokens: int | None = None,
        checker: str = DEFAULT_CHECKER,
        allow_code: bool = False,
    ) -> None:
        self._path, self._model, self._max_tokens = path, model, max_tokens
        self._checker, self._allow_code = checker, allow_code

    @property
    def digest(self) -> str:
        """Of the bytes of the file."""
        return hashlib.sha256(self._path.read_bytes()).hexdigest()[:16]

    @property
    def canvas_len(self) -> int:
        return max(map(self.canvas_of, self._rows))

    def canvas_of(self, text: str) -> int:
        return self._rows[text].max_tokens or self._default_len

    def check(self, num_prompts: int = 1) -> None:
        """Reads the file.

        Raises:
            InvalidRequest: a row is invalid, or there are fewer than `num_prompts` prompts.
        """
        if len(self._rows) < num_prompts:
            problem = f"has {len(self._rows)} prompts; give at least {num_prompts}"
            raise InvalidRequest("tasks", str(self._path), problem)

    @property
    def num_prompts(self) -> int:
        return len(self._rows)

    def texts(self, seed: int, count: int) -> list[str]:
        every = list(self._rows)
        order = np.random.default_rng([seed, len(every)]).permutation(len(every))
        return [every[place] for place in order[:count]]

    def prompts(self, llm: LLM, texts: list[str]) -> list[Any]:
        chat_prompt = llm.engine.intake.chat_prompt
        return [
            text if (messages := self._rows[text].messages) is None else chat_prompt(messages)
            for text in texts
        ]

    def score(self, prompt: str, answer: str) -> float:
        """Raises CheckFailed if a checker of the user's fails."""
        row = self._rows[prompt]
        return self._checkers[row.checker](answer, row.fields)

    @cached_property
    def _rows(self) -> dict[str, Row]:
        """By text, in the order of the file.

        Raises:
            InvalidRequest: a row is invalid; the error names its line.
        """
        found: dict[str, Row] = {}
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            self._add(found, _read(number, line, self._checker))
                        except InvalidRequest as error:
                            raise error.at(f"{self._path}, line {number:,}") from None
        except OSError as error:
            raise InvalidRequest("tasks", str(self._path), f"cannot be read: {error.strerror}") from None
        if not found:
            raise InvalidRequest("tasks", str(self._path), "has no rows")
        self._check_lengths(found)
        return found

    def _add(self, found: dict[str, Row], row: Row) -> None:
        if row.checker not in self._checkers:
            folder = str(self._path.parent)
            own = checker_of(row.checker, allow_code=self._allow_code, import_from=folder)
            self._checkers[row.checker] = own
        check_answer(row.checker, row.answer)
        first = found.setdefault(row.text, row)
        if (first.answer, first.checker) != (row.answer, row.checker):
            problem = f"differs from that of line {first.line:,}, which has the same prompt"
            raise InvalidRequest("answer", row.answer, problem)

    @cached_property
    def _checkers(self) -> dict[str, Checker]:
        return {}

    @cached_property
    def _default_len(self) -> int:
        return self._max_tokens or ROOM + max(self._num_tokens(row.answer) for row in self._rows.values())

    def _num_tokens(self, text: str) -> int:
        return len(_tokenizer(self._model).encode(text, add_special_tokens=False))

    def _check_lengths(self, rows: dict[str, Row]) -> None:
        """Raises InvalidRequest for an answer that is longer than its canvas."""
        for row in rows.values():
            canvas_len = row.max_tokens or self._max_tokens
            if canvas_len is None or row.checker not in WRITES_THE_ANSWER:
                continue
            if (num_tokens := self._num_tokens(row.answer)) > canvas_len:
                problem = f"has {num_tokens} tokens, more than the canvas of {canvas_len}; raise max_tokens"
                place = f"{self._path}, line {row.line:,}"
                raise InvalidRequest("answer", row.answer, problem).at(place)


def _read(number: int, line: bytes, checker: str) -> Row:
    """A row from a line.

    Raises:
        InvalidRequest: the line is invalid; the error names the field.
    """
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequest("JSON", line.decode(errors="replace"), f"cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("JSON", fields, "must be an object")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequest("prompt", prompt, "give one of prompt and messages")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise InvalidRequest("prompt", prompt, "must be text")
    if messages is not None and (not isinstance(messages, list) or not messages):
        raise InvalidRequest("messages", messages, "must be a list of at least one message")
    answer, max_tokens = fields.get("answer"), fields.get("max_tokens")
    if answer is None:
        raise InvalidRequest("answer", None, "is missing")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise InvalidRequest("answer", answer, "must be text or a number")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise InvalidRequest("max_tokens", max_tokens, "must be a positive integer")
    return Row(
        number,
        json.dumps(messages) if prompt is None else prompt,
        messages,
        str(answer),
        max_tokens,
        fields.get("checker", checker),
        {**fields, "answer": str(answer)},
    )


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    with model_directory(model) as directory:
        tokenizer = load_tokenizer(directory, required=True)
    assert tokenizer is not None, "it is required"
    return tokenizer
