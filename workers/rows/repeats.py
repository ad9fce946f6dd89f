"""Sequences that are in a pack several times, computed once.

Samples of one prompt begin with the same canvas. Greedy requests that differ in their policies alone often
hold the same tokens for some steps. The rows of such sequences are equal up to the last layer, where each
canvas has candidates of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from remask.workers.attention.varlen import ShadowSegment, VarlenLayout
from remask.workers.burst.state import BurstState
from remask.workers.rows.pack import PackedRows

Span = tuple[int, int]


class Kept(NamedTuple):
    """Which of some runs of rows stay.

    Attributes:
        numbers: for each run, the number of the equal run that stays, among those that stay.
        spans: the rows of each run that stays, before.
        bounds: the boundaries of those that stay, after.
    """

    numbers: list[int]
    spans: list[Span]
    bounds: tuple[int, ...]

    def moved(self, run: int) -> Span:
        """Where the rows of a run are after."""
        number = self.numbers[run]
        return self.bounds[number], self.bounds[number + 1]


def may_repeat(canvases: Sequence[int], state: BurstState) -> bool:
    """Whether to look for equal sequences of some canvases of a burst, on a host: if two have the same length
    and the same fixed tokens before their slots, or if fixed tokens are masked in second copies. (A canvas
    that comes to hold the prompt of another one is not looked for.)"""
    tokens, beginnings = state.tokens.numpy(), set[Hashable]()
    for c in canvases:
        spec, (start, end) = state.specs[c], state.cu_tokens[c : c + 2]
        if spec.is_guided:
            return True
        beginnings.add((end - start, tokens[start : start + spec.num_leading].tobytes()))
    return len(beginnings) < len(canvases)


def without_repeats(rows: PackedRows) -> PackedRows:
    """A pack of live rows, on a CPU, without repeated rows. The candidates keep their order.

    Sequences of equal tokens share their main rows. Of those, sequences with equal shadow rows share them.
    """
    before, ids = rows.layout, rows.ids_T.numpy()
    spans = list(pairwise(before.cu_keys))
    main = _kept(spans, (ids[start:end].tobytes() for start, end in spans))
    if len(main.spans) == len(spans):
        return rows
    shadows = _kept(
        [segment.keys for segment in before.shadows],
        ((main.numbers[own.sequence], own.mask.numpy().tobytes()) for own in before.shadows),
    )
    num_main_before, num_main = before.cu_keys[-1], main.bounds[-1]
    stays = torch.cat(
        [
            torch.arange(start + first_row, end + first_row)
            for own, first_row in ((main, 0), (shadows, num_main_before))
            for start, end in own.spans
        ]
    )
    candidates, asked = rows.candidates_H.clone(), rows.candidate_layout
    for number, queries in enumerate(pairwise(asked.cu_queries)):
        candidates[slice(*queries)] += main.moved(number)[0] - spans[number][0]
    for number, segment in enumerate(asked.shadows):
        queries = slice(*(asked.cu_queries[-1] + bound for bound in segment.queries))
        candidates[queries] += num_main + shadows.moved(number)[0] - num_main_before - segment.keys[0]
    every, read = (
        [
            ShadowSegment(main.numbers[own.sequence], own.queries, shadows.moved(number), own.mask)
            for number, own in enumerate(layout.shadows)
        ]
        for layout in (before, asked)
    )
    first = dict(zip(reversed(shadows.numbers), reversed(every), strict=True))
    every = [replace(first[number], queries=first[number].keys) for number in range(len(shadows.spans))]
    return replace(
        rows,
        ids_T=rows.ids_T[stays],
        positions_T=rows.positions_T[stays],
        layout=VarlenLayout(main.bounds, main.bounds, tuple(every)),
        candidates_H=candidates,
        candidate_layout=VarlenLayout(
            asked.cu_queries, main.bounds, tuple(read), keys_of=tuple(main.numbers)
        ),
    )


def _kept(spans: list[Span], contents: Iterable[Hashable]) -> Kept:
    """Of runs of rows with equal contents the first."""
    found: dict[Hashable, int] = {}
    numbers = [found.setdefault(content, len(found)) for content in contents]
    first = dict(zip(reversed(numbers), reversed(spans), strict=True))
    stay = [first[number] for number in range(len(found))]
    return Kept(numbers, stay, (0, *accumulate(end - start for start, end in stay)))
