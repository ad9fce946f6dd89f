"""Errors that a user may see. The class decides the HTTP status; the message says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import msgspec

SHOWN_LEN = 120  # characters of a value in a message


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
        super().__init__(f"{parameter}: {problem} (got {_shown(value)})")

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        return type(self), (self.parameter, self.value, self.problem)

    def at(self, place: str) -> InvalidRequest:
        """The same error with the place it came from (a prompt's index) in front of the parameter."""
        return InvalidRequest(f"{place}: {self.parameter}", self.value, self.problem)


def _shown(value: object) -> str:
    """The beginning of a value; no more of it is written out."""
    shown = ""
    for piece in _pieces(value):
        shown += piece
        if len(shown) > SHOWN_LEN:
            return shown[: SHOWN_LEN - 3] + "..."
    return shown


def _pieces(value: object) -> Iterator[str]:
    """`repr(value)`, bit by bit."""
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        yield "[" if isinstance(value, list) else "("
        for place, item in enumerate(value):
            yield ", " if place else ""
            yield from _pieces(item)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")"
    elif type(value) is dict:
        yield "{"
        for place, (key, item) in enumerate(value.items()):
            yield f"{', ' if place else ''}{key!r}: "
            yield from _pieces(item)
        yield "}"
    elif isinstance(value, str | bytes):
        yield repr(value[: SHOWN_LEN + 1])
    else:
        yield repr(value)


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
