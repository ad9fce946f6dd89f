"""Which arms are worth their cost: those on the frontiers of a run, and those that win at equal time.

An arm is on a frontier of a setting if at one of its thresholds no other point is at least as good in both
respects and better in one. Quality is the mean score. The other respect is the time of a sample, or the
number of distinct right answers of a prompt's samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]
SIGNIFICANT = 0.05  # of the corrected p values


def frontiers(cells: Sequence[Row]) -> list[Row]:
    """A row for each setting: its arms on the frontier of score and time, and on that of score and distinct
    right answers, with their thresholds.

    Args:
        cells: rows of all cells.
    """

    def key(cell: Row) -> tuple[str, float, str, int]:
        return cell["task"], cell["temperature"], cell["rank"], cell["block_length"] or 1 << 30

    rows = []
    for _, group in groupby(sorted(cells, key=key), key=key):
        own = list(group)
        rows.append(
            {
                **{name: own[0][name] for name in ("task", "temperature", "rank", "block_length")},
                "cost": _best(own, lambda cell: (cell["score"], -cell["milliseconds"])),
                "diversity": _best(
                    [cell for cell in own if cell.get("right_answers") is not None],
                    lambda cell: (cell["score"], cell["right_answers"]),
                ),
            }
        )
    return rows


def winners(compared: Sequence[Row]) -> list[Row]:
    """The comparisons at equal time in which an arm has a higher score than its base, after correction, and
    also if its forwards take longer by the scatter of the measured times."""
    return [
        row
        for row in compared
        if row["equal"] == "milliseconds"
        and row["measure"] == "score"
        and row["low"] > 0
        and row["low_if_slower"] > 0
        and row["p_holm"] < SIGNIFICANT
        and not row["beyond"]
    ]


def _best(cells: Sequence[Row], values_of: Callable[[Row], tuple[float, float]]) -> str:
    """The arms of cells that no other cell dominates, with their thresholds: `plain 0.5, 0.7; wino 0.9`."""
    points = [values_of(cell) for cell in cells]
    found: dict[str, list[str]] = {}
    for cell, own in zip(cells, points, strict=True):
        if not any(_dominates(other, own) for other in points):
            threshold = "" if cell["threshold"] is None else f"{cell['threshold']:g}"
            found.setdefault(cell["arm"], []).append(threshold)
    return "; ".join(f"{arm} {', '.join(sorted(set(own)))}".strip() for arm, own in found.items())


def _dominates(other: tuple[float, float], own: tuple[float, float]) -> bool:
    return other != own and other[0] >= own[0] and other[1] >= own[1]
