"""The arguments of a call: the entries of a list, column or iterator, and one value for each prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.plain import listed


def entries_of(values: Any, part: type, max_parts: int, max_entries: int | None) -> list[Any] | None:
    """The entries of a list, a column or an iterator; None: the value is none of these.

    An iterator may have no end, so that at most one entry more is taken from it than there may be.

    Args:
        values: entries, or the parts of a single one, such as ids or messages.
        part: type of the parts.
        max_parts: how many there may be.
        max_entries: how many there may be; None: any number.
    """
    if not isinstance(values, Iterator):
        return listed(values)
    first = list(itertools.islice(values, 1))
    is_single = any(isinstance(entry, part) for entry in first)
    return [*first, *itertools.islice(values, max_parts if is_single else max_entries)]


def one_each(name: str, values: Any, count: int) -> list[Any]:
    """A value for each of `count` prompts: those given, or the one that is given for all.

    Raises:
        InvalidRequest: as many were not given; `name` is what the error calls them.
    """
    given = None if isinstance(values, Mapping) else listed(values, count + 1)  # it may have no end
    if given is None:
        return [values] * count
    if len(given) != count:
        num_given = len(values) if isinstance(values, Sized) else len(given)
        raise InvalidRequest(name, num_given, f"give one for each of the {count} prompts")
    return given
