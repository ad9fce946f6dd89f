"""Errors that users may see. The class determines the HTTP status; the message says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
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
    """A parameter of the request is invalid.

    Attributes:
        parameter: name of the field or file at fault, behind its place if it has one.
        value: the invalid value.
        problem: the reason, and how to correct it.
        field: the parameter without its place.
    """

    status = 400

    def __init__(self, parameter: str, value: object, problem: str, field: str | None = None) -> None:
        self.parameter, self.value, self.problem = parameter, value, problem
        self.field = parameter if field is None else field
        super().__init__(f"{cut(parameter, MAX_NAME)}: {problem} (got {shown(value)})")

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str, str]]:
        return type(self), (self.parameter, self.value, self.problem, self.field)

    def at(self, place: str) -> InvalidRequest:
        """A copy of the error with its place, such as a prompt's index, in front of the parameter."""
        return InvalidRequest(f"{place}: {self.parameter}", self.value, self.problem, self.field)

    def renamed(self, names: Mapping[str, str]) -> InvalidRequest:
        """A copy of the error with the name by which its caller knows the field."""
        field = names.get(self.field, self.field)
        place = self.parameter.removesuffix(self.field)
        return InvalidRequest(place + field, self.value, self.problem, field)


class UnknownModel(InvalidRequest):
    """A request names a model that is not served."""

    status = 404


class Overloaded(RemaskError):
    """The engine's queue is full (`max_queued_requests`, `max_queued_tokens`); try again later."""

    status = 429


class RequestTooLarge(RemaskError):
    """A step of the request does not fit into a worker's memory, even if it runs alone."""

    status = 413


class RequestFailed(RemaskError):
    """A step of the request raised an error, even if it ran alone, or its logits are not numbers."""


class WorkerDied(RemaskError):
    """Several workers in a row died while the request ran alone."""


class Unavailable(RemaskError):
    """No worker is running and none can be started."""

    status = 503


class EngineDead(RemaskError):
    """The engine was closed or has failed; make a new one."""

    status = 503


def shown(value: object) -> str:
    """`repr(value)`, cut to 120 characters. Only the shown part of a text or container is formatted."""
    return cut(_formatted(value, MAX_SHOWN))


def cut(text: str, length: int = MAX_SHOWN) -> str:
    """The text; if it is longer than `length`, its start followed by dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _formatted(value: object, room: int) -> str:
    """The start of `repr(value)`: all of it if it has at most `room` characters, else more than `room`.

    A long container of a type that is not Python's own, such as an array, is described by its length.
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
    """The start of a container's `repr`; `formatted` writes one entry."""
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
    """The number of entries; 0 if the value is not a container."""
    try:
        return len(value)  # type: ignore[arg-type]
    except Exception:
        return 0


def did_you_mean(name: object, known: Collection[str]) -> str:
    """A hint: the closest known name, or all known names."""
    text = cut(name) if isinstance(name, str) else shown(name)
    close = difflib.get_close_matches(text, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def invalid_field(parent: str, fields: dict[str, Any], error: msgspec.ValidationError) -> InvalidRequest:
    """An InvalidRequest from msgspec's message, which names the field, and the value of that field."""
    problem, _, path = str(error).rpartition(" - at ")
    problem, path = (problem, path) if problem else (path, "")  # a message may name no field
    found = re.search(r"\$\.(\w+)", path)
    name = found.group(1) if found else ""
    value = fields.get(name, fields)
    return InvalidRequest(".".join(filter(None, (parent, name))), value, problem[:1].lower() + problem[1:])
