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
from torch import Tensor

from remask.scheduler.light_rows import LightRows

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


def places(own: Mapping[int, KeptRows], cu_rows: np.ndarray) -> Tensor:
    """The kept row that takes the keys and values of each row of a pack, int64 [T].

    Args:
        own: the kept rows of its sequences, by place.
        cu_rows: boundaries of the sequences.
    """
    found = np.full(cu_rows[-1], DISCARDED, dtype=np.int64)
    for place, (first, light) in own.items():
        rows = found[cu_rows[place] : cu_rows[place + 1]]
        rows[:] = first + np.arange(len(rows)) if light is None else first + light.positions
        if light is not None:
            rows[~light.are_fresh] = DISCARDED
    return torch.from_numpy(found)
