"""Kept rows: which keys and values outlive a forward, and which sequences of a pack consist of them.

A full forward of a canvas that reuses keys writes the keys and values of all its rows to kept rows. A light
forward computes some rows, writes theirs over the kept ones, and sees all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from remask.scheduler.light_rows import LightRows
from remask.workers.rows.pack import KeptPlaces
from remask.workers.rows.padding import Padding

DISCARDED = 0  # the kept row that takes what is not kept


class KeptRows(NamedTuple):
    """The kept rows of a sequence.

    Attributes:
        first: the first of them; a second copy has the next ones.
        light: the rows that a forward computes; None: all of them.
    """

    first: int
    light: LightRows | None


KeptCanvases: TypeAlias = Mapping[int, KeptRows]  # of the canvases of a burst that reuse keys
NOTHING_KEPT: KeptCanvases = MappingProxyType({})


def kept_sequences(
    kept: KeptCanvases, sequences: Sequence[int], lens: Sequence[int], num_first: int
) -> dict[int, KeptRows]:
    """The kept rows of the sequences of a pack, by place.

    Args:
        kept: of canvases.
        sequences: the canvas of each sequence.
        lens: their lengths.
        num_first: how many of them are no second copies.
    """
    return {
        place: own._replace(first=own.first + lens[place] * (place >= num_first))
        for place, canvas in enumerate(sequences)
        if (own := kept.get(canvas)) is not None
    }


def kept_places(
    own: Mapping[int, KeptRows], lens: np.ndarray, cu_rows: np.ndarray, padding: Padding, *, gathers: bool
) -> KeptPlaces:
    """The kept keys of a pack.

    Args:
        own: the kept rows of its sequences, by place.
        lens: lengths of all sequences.
        cu_rows: boundaries of the sequences.
        padding: of the pack; the discarded row fills up.
        gathers: see `plan_pack`.
    """
    found = np.full(cu_rows[-1], DISCARDED, dtype=np.int64)
    gathered, num_fresh = [], int(cu_rows[-1])
    for place, (first, light) in own.items():
        rows = found[cu_rows[place] : cu_rows[place + 1]]
        if light is None:
            rows[:] = first + np.arange(len(rows))
        else:
            rows[:] = np.where(light.are_fresh, first + light.positions, DISCARDED)
            gathered.append(first + np.arange(lens[place]))
            num_fresh = min(num_fresh, int(cu_rows[place]))
    num_more = max(0, padding.gathered - sum(map(len, gathered)))
    gathered.append(np.full(num_more, DISCARDED))
    return KeptPlaces(
        places_T=torch.from_numpy(found),
        gathered=torch.from_numpy(np.concatenate(gathered)) if gathers and num_fresh < cu_rows[-1] else None,
        num_fresh=max(num_fresh, padding.fresh_keys),
        num_main=int(cu_rows[-1]),
    )
