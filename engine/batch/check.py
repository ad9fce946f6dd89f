"""The first pass: checks every line before any request runs.

Of each line it keeps a 16-byte digest of the custom_id, so a million lines take 16 MB. The digests find
duplicates. After an interruption they show whether a result belongs to its index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from remask.batch.lines import LineReader
from remask.batch.source import Source
from remask.scheduler.errors import InvalidRequest, RemaskError, shown

MAX_SHOWN = 20  # faults listed in an error
DIGEST_BYTES = 16

Report = Callable[[str, int, int | None], None]  # current phase, lines done, total (None: unknown)


class InvalidBatch(RemaskError, ValueError):
    """Lines of the input are invalid. Nothing was run.

    Attributes:
        faults: line number and problem of the first MAX_SHOWN invalid lines.
        num_faults: number of invalid lines.
    """

    def __init__(self, path: Path, unit: str, faults: list[tuple[int, str]], num_faults: int) -> None:
        self.faults, self.num_faults = faults, num_faults
        messages = [f"{path}: {unit} {number:,}: {problem}" for number, problem in faults]
        if num_faults > len(faults):
            messages.append(f"and {num_faults - len(faults):,} more")
        messages.append(f"{num_faults:,} invalid; nothing was run")
        super().__init__("\n".join(messages))


class CustomIds:
    """Digests of the custom_ids of a file, by index."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def append(self, custom_id: str) -> None:
        self._digests += _digest(custom_id)

    def matches(self, index: int, custom_id: str) -> bool:
        """Whether the line at this index has this custom_id."""
        start = index * DIGEST_BYTES
        return 0 <= index < len(self) and self._digests[start : start + DIGEST_BYTES] == _digest(custom_id)

    def duplicates(self) -> list[tuple[int, int]]:
        """Pairs of indices (first, later) with the same custom_id, ordered by the later one."""
        halves = np.frombuffer(self._digests, "<u8").reshape(-1, 2)
        order = np.lexsort((halves[:, 0], halves[:, 1]))  # stable: equal digests stay in file order
        ordered = halves[order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        first = np.arange(len(order))
        first[1:][same] = 0
        first = order[np.maximum.accumulate(first)]
        later = np.flatnonzero(same) + 1
        return sorted(((int(first[i]), int(order[i])) for i in later), key=lambda pair: pair[1])


def check_lines(source: Source, reader: LineReader, *, record_invalid: bool, report: Report) -> CustomIds:
    """Checks the whole input.

    Args:
        record_invalid: accept invalid lines, which become results. Duplicate custom_ids are refused anyway.

    Raises:
        InvalidBatch: lines are invalid.
        InvalidRequest: there are no lines, or the file cannot be read.
    """
    ids = CustomIds()
    faults: list[tuple[int, str]] = []
    num_faults = 0
    for number, content in source:
        line = reader.read(number, content)
        ids.append(line.custom_id)
        if line.fault is not None and not record_invalid:
            num_faults += 1
            if len(faults) < MAX_SHOWN:
                faults.append((number, str(line.fault)))
        report("checking", len(ids), None)
    if not len(ids):
        raise InvalidRequest("--input-file", str(source.path), "holds no requests")
    duplicates = ids.duplicates()
    faults += _tell_duplicates(source, reader, duplicates[: MAX_SHOWN - len(faults)])
    num_faults += len(duplicates)
    if num_faults:
        raise InvalidBatch(source.path, source.unit, sorted(faults), num_faults)
    return ids


def _tell_duplicates(
    source: Source, reader: LineReader, duplicates: list[tuple[int, int]]
) -> list[tuple[int, str]]:
    """Faults of duplicates. Reads the file again for their line numbers."""
    if not duplicates:
        return []
    wanted = {place for pair in duplicates for place in pair}
    lines = {
        place: (number, reader.read(number, content).custom_id)
        for place, (number, content) in enumerate(source)
        if place in wanted
    }
    return [
        (
            lines[later][0],
            f"custom_id: {shown(lines[later][1])} is already in {source.unit} {lines[first][0]:,}",
        )
        for first, later in duplicates
    ]


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=DIGEST_BYTES).digest()
