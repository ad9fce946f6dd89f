"""Errors that a user may see. The class decides the HTTP status; the message says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

MAX_SHOWN = 120  # characters of a value in an error


class RemaskError(Exception):
    """Base of every error that remask raises on purpose.

    Attributes:
        status: HTTP status of the class.
    """

    status: ClassVar[int] = 500


class InvalidRequest(RemaskError, ValueError):
    """The caller asked for something that cannot be done.

    Attributes:
        parameter: name of the field or file at fault.
        value: what was given.
    """

    status = 400

    def __init__(self, parameter: str, value: object, problem: str) -> None:
        self.parameter, self.value, self.problem = parameter, value, problem
        super().__init__(f"{parameter}: {problem} (got {shown(value)})")

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        return type(self), (self.parameter, self.value, self.problem)

    def at(self, place: str) -> InvalidRequest:
        """The same error with the place it came from (a prompt's index) in front of the parameter."""
        return InvalidRequest(f"{place}: {self.parameter}", self.value, self.problem)


class Overloaded(RemaskError):
    """The engine has as many requests or tokens waiting as its options allow; try again later."""

    status = 429


class RequestTooLarge(RemaskError):
    """A step of the request does not fit into a worker's memory, also if it runs alone."""

    status = 413


class RequestFailed(RemaskError):
    """A step of the request raised an error, also if it ran alone, or left numbers that mean nothing."""


class WorkerDied(RemaskError):
    """Workers died again and again while the request ran alone."""


class Unavailable(RemaskError):
    """No worker is running and none can be started."""

    status = 503


class EngineDead(RemaskError):
    """The engine was closed or has failed; make a new one."""

    status = 503


def shown(value: object) -> str:
    """As `repr`, cut to 120 characters; no more of a text or a container is formatted than is shown."""
    text = _formatted(value, MAX_SHOWN)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _formatted(value: object, room: int) -> str:
    """The start of `repr(value)`: all of it if that has at most `room` characters, else more than `room`."""
    if room < 0:
        return "..."
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: room + 1])
    if type(value) not in (list, tuple, dict):
        try:
            return repr(value)
        except Exception:  # a `repr` that fails must not hide what was wrong with the value
            return f"<{type(value).__name__}>"
    assert isinstance(value, list | tuple | dict), "checked"
    parts: list[str] = []
    left = room - 1  # a bracket: deep nesting uses the room up, too
    for item in value:
        part = _formatted(item, left)
        if isinstance(value, dict):
            part += ": " + _formatted(value[item], left - len(part))
        parts.append(part)
        left -= len(part) + 2
        if left < 0 and len(parts) < len(value):
            parts.append("...")
            break
    text = ", ".join(parts)
    if isinstance(value, tuple):
        return f"({text},)" if len(value) == 1 else f"({text})"
    return f"[{text}]" if isinstance(value, list) else f"{{{text}}}"


def did_you_mean(name: object, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def invalid_field(parent: str, fields: dict[str, Any], error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec's message, with the field it names put in front and the value that was given behind."""
    problem, _, path = str(error).partition(" - at ")
    found = re.search(r"\$\.(\w+)", path)
    name = found.group(1) if found else ""
    value = fields.get(name, fields)
    return InvalidRequest(".".join(filter(None, (parent, name))), value, problem[:1].lower() + problem[1:])
