"""The rows of a forward that reuses keys and values (Wu et al. 2025, Fast-dLLM)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remask.scheduler.sampling import Reuse


class LightRows(NamedTuple):
    """The main rows of a light forward in one block.

    Attributes:
        positions: int64 [n], ascending.
        are_fresh: bool [n]: rows whose keys and values replace the kept ones in this forward. The others only
            answer.
        of_slots: int64 [B]: the row of each slot, an index of `positions`.
    """

    positions: NDArray[np.int64]
    are_fresh: NDArray[np.bool_]
    of_slots: NDArray[np.int64]


def light_rows(slots: NDArray[np.int64], shift: int, reuse: Reuse, sequence_len: int) -> LightRows:
    """The rows that a light forward computes.

    Args:
        slots: positions of the block's slots.
        shift: row i - shift predicts position i. The rows that answer for the slots are computed, too.
        reuse: "both": the slots; "prefix": all rows from the first of them on.
        sequence_len: rows of the sequence.
    """
    answering = np.maximum(slots - shift, 0)
    if reuse == "prefix":
        positions = np.arange(answering.min(), sequence_len)
        are_fresh = np.ones(len(positions), dtype=np.bool_)
    else:
        positions = np.union1d(slots, answering)
        are_fresh = np.isin(positions, slots)
    return LightRows(positions, are_fresh, np.searchsorted(positions, slots))
