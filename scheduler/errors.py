"""Errors that a user may see. The class decides the HTTP status; the message says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import msgspec

MAX_SHOWN = 120  # characters of a value in an error
MAX_NAME = 240  # characters of what an error calls its parameter


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
        super().__init__(f"{cut(parameter, MAX_NAME)}: {problem} (got {shown(value)})")

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
    return cut(_formatted(value, MAX_SHOWN))


def cut(text: str, length: int = MAX_SHOWN) -> str:
    """The text, or its start and dots if it is longer than `length`."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _formatted(value: object, room: int) -> str:
    """The start of `repr(value)`: all of it if that has at most `room` characters, else more than `room`.

    A container of another kind than Python's own, such as an array, is told by its length if it is long.
    """
    if room < 0:
        return "..."
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: room + 1])
    try:
        fields = getattr(value, "_fields" if isinstance(value, tuple) else "__struct_fields__", None)
        if isinstance(value, tuple | msgspec.Struct) and fields is not None:
            return _joined(type(value).__name__ + "(", fields, ")", _field_of(value), room)
        if isinstance(value, dict):
            return _joined("{", value.items(), "}", _formatted_pair, room)
        if isinstance(value, list):
            return _joined("[", value, "]", _formatted, room)
        if isinstance(value, tuple):
            return _joined("(", value, ",)" if len(value) == 1 else ")", _formatted, room)
        if isinstance(value, set | frozenset) and value:
            opening, closing = ("{", "}") if isinstance(value, set) else ("frozenset({", "})")
            return _joined(opening, value, closing, _formatted, room)
        length = _length(value)
        return f"<{type(value).__name__} of {length} entries>" if length > MAX_SHOWN else repr(value)
    except Exception:  # a `repr` that fails must not hide what was wrong with the value
        return f"<{type(value).__name__}>"


def _joined(
    opening: str, entries: Collection[Any], closing: str, formatted: Callable[[Any, int], str], room: int
) -> str:
    """The start of a container's text, as `_formatted`; `formatted` writes an entry."""
    parts: list[str] = []
    left = room - len(opening)  # deep nesting uses the room up, too
    for entry in entries:
        parts.append(formatted(entry, left))
        left -= len(parts[-1]) + 2
        if left < 0 and len(parts) < len(entries):
            parts.append("...")
            break
    return opening + ", ".join(parts) + closing


def _formatted_pair(pair: tuple[object, object], room: int) -> str:
    key = _formatted(pair[0], room)
    return f"{key}: {_formatted(pair[1], room - len(key))}"


def _field_of(value: object) -> Callable[[str, int], str]:
    return lambda name, room: f"{name}={_formatted(getattr(value, name), room)}"


def _length(value: object) -> int:
    """The number of entries; 0 for what is no container."""
    try:
        return len(value)  # type: ignore[arg-type]
    except Exception:
        return 0


def did_you_mean(name: object, known: Collection[str]) -> str:
    """The known name that is meant, or all of them."""
    text = cut(name) if isinstance(name, str) else shown(name)
    close = difflib.get_close_matches(text, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def invalid_field(parent: str, fields: dict[str, Any], error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec's message, with the field it names put in front and the value that was given behind."""
    problem, _, path = str(error).rpartition(" - at ")
    problem, path = (problem, path) if problem else (path, "")  # a message may name no field
    found = re.search(r"\$\.(\w+)", path)
    name = found.group(1) if found else ""
    value = fields.get(name, fields)
    return InvalidRequest(".".join(filter(None, (parent, name))), value, problem[:1].lower() + problem[1:])
