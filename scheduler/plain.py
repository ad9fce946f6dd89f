"""Converts values of NumPy, pandas, Arrow and iterators to plain Python values.

Users pass columns, arrays, NumPy numbers and generators where the engine needs lists, integers and text. None
of these libraries is imported: arrays, columns and scalars have `tolist`, `to_list`, `to_pylist` or `as_py`.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, Sequence, ValuesView
from itertools import islice
from typing import Any

MAX_DEPTH = 8  # conversations of messages with parts are five levels deep
MAX_ITERATED = 2**20  # entries of an iterator, which may have no end
_PLAIN = frozenset({int, str, float, bool, type(None)})


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Converts sequences, arrays, columns and iterators to lists and mappings to dicts, at every level.

    Args:
        value: anything. A value without a plain form is returned unchanged, and so is an iterator of more
            than `MAX_ITERATED` entries.
        depth: levels to convert; deeper ones are left unchanged.
    """
    if type(value) in _PLAIN or depth == 0:
        return value
    if isinstance(value, Mapping):
        return {_plain_key(key): plain(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, Iterator):
        entries = list(islice(value, MAX_ITERATED + 1))
        if len(entries) > MAX_ITERATED:
            return value
    else:
        entries = listed(value)
    if entries is None:
        item = _converted(value)
        return value if isinstance(item, list) else item  # a number or text of NumPy
    return [entry if type(entry) in _PLAIN else plain(entry, depth - 1) for entry in entries]


def _plain_key(key: Any) -> Any:
    converted = _converted(key)
    return key if isinstance(converted, list) else converted  # a list cannot be a key


def listed(value: Any, limit: int | None = None) -> list[Any] | None:
    """The entries of a sequence, an array, a column or an iterator; None for any other value.

    Sets, which have no order, and data frames, whose entries are names of columns, count as other values.

    Args:
        value: anything.
        limit: maximum number of entries; None: all.
    """
    if isinstance(value, str | bytes | bytearray):
        return None
    if isinstance(value, Sequence | Iterator | KeysView | ValuesView):
        return list(islice(value, limit))
    entries = _converted(value)
    return entries[:limit] if isinstance(entries, list) else None


def _converted(value: Any) -> Any:
    """The plain form of an array, a column or a scalar; other values unchanged."""
    for name in ("tolist", "to_list", "to_pylist", "as_py"):
        method = None if isinstance(value, type) else getattr(value, name, None)
        if callable(method):
            return method()
    return value
