"""Checkers: whether a text answers a row of a task file.

A checker is a name of `CHECKERS`, or `module:function`, a function of the user's. That one is code, so it
runs only if asked for, in a process of its own with limits (`remask.benchmarks.study.sandbox`).
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from remask import InvalidRequest
from remask.benchmarks.study.sandbox import Sandbox
from remask.scheduler.errors import did_you_mean

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
CHOICE = r"\(?([A-Z])\b\)?"
STATED_CHOICE = re.compile(rf"(?i:answer)(?: (?i:is))?\s*:?\s*{CHOICE}")
FIRST_CHOICE = re.compile(r"^\s*\(?([A-Z])(?:[).:]|\s*$)", re.MULTILINE)
BRACKETED_CHOICE = re.compile(r"\(([A-Z])\)")


class Checker(Protocol):
    """Judges a text, from 0 to 1."""

    def __call__(self, text: str, row: dict[str, Any]) -> float:
        """Args:
            text: the text that was written.
            row: the row of the task file; its `answer` is text.

        Raises:
            CheckFailed: the text cannot be judged.
        """
        ...


def exact(text: str, row: dict[str, Any]) -> float:
    """The text is the answer, white space around them apart."""
    return float(text.strip() == row["answer"].strip())


def contains(text: str, row: dict[str, Any]) -> float:
    """The answer stands somewhere in the text."""
    return float(row["answer"].strip() in text)


def number(text: str, row: dict[str, Any]) -> float:
    """The last number of the text equals the last number of the answer."""
    own, right = _last_number(text), _last_number(row["answer"])
    return float(own is not None and own == right)


def regex(text: str, row: dict[str, Any]) -> float:
    """The answer is a regular expression that matches somewhere in the text."""
    return float(re.search(row["answer"], text) is not None)


def multiple_choice(text: str, row: dict[str, Any]) -> float:
    """The letter that the text chooses is the answer's: the last one behind "answer", else one that begins a
    line by itself, else the last one in brackets."""
    return float(_choice(text) == _choice(row["answer"]) is not None)


CHECKERS: dict[str, Checker] = {
    own.__name__: own for own in (exact, contains, number, regex, multiple_choice)
}


def checker_of(name: object, *, allow_code: bool, import_from: str) -> Checker:
    """A checker by its name.

    Args:
        name: as a task file has it.
        allow_code: whether `module:function` may run.
        import_from: folder in which the module is looked for besides the installed packages.

    Raises:
        InvalidRequest: there is no such checker, or it is code and was not asked for.
    """
    if isinstance(name, str) and name in CHECKERS:
        return CHECKERS[name]
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+:[\w.]+", name):
        hint = did_you_mean(str(name), [*CHECKERS])
        raise InvalidRequest("checker", name, f"is not known; {hint}, or give module:function")
    if not allow_code:
        raise InvalidRequest("checker", name, "is code, which runs only if asked for; give --allow-code")
    return Sandbox(name, import_from)


def check_answer(checker: str, answer: str) -> None:
    """Raises InvalidRequest for an answer with which a checker cannot judge."""
    problem = None
    if checker == "number" and _last_number(answer) is None:
        problem = "has no number"
    elif checker == "multiple_choice" and _choice(answer) is None:
        problem = "names no choice; give a letter, such as B"
    elif checker == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            problem = f"is no regular expression: {error}"
    if problem is not None:
        raise InvalidRequest("answer", answer, problem)


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _choice(text: str) -> str | None:
    for pattern, which in ((STATED_CHOICE, -1), (FIRST_CHOICE, 0), (BRACKETED_CHOICE, -1)):
        found: list[Any] = list(pattern.finditer(text))
        if found:
            return found[which][1]
    return None
