"""The ids that end canvases, in a table as long as all lists together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.sampling import TOKEN
from remask.workers.tensors import HoldsTensors

SPAN = 1 << 31  # above every id
NO_KEY = np.iinfo(np.int64).max


class StopIds(HoldsTensors):
    """The lists of R canvases. Equal lists, which are common, are stored once.

    Args:
        lists: the ids of each canvas, int32, ascending.
        least: minimum number of entries.

    Attributes:
        first_key: int64 [R, 1]: the number of the canvas's list times `SPAN`.
        keys: int64 [entries], ascending: the number of a list times `SPAN`, plus an id.
    """

    def __init__(self, lists: Sequence[bytes], least: int = 0) -> None:
        numbers = {ids: number for number, ids in enumerate(dict.fromkeys(lists))}
        keys = [np.frombuffer(ids, TOKEN) + np.int64(number * SPAN) for ids, number in numbers.items()]
        num_more = max(1, least - sum(map(len, keys)))
        self.first_key = torch.tensor([[numbers[ids] * SPAN] for ids in lists])
        self.keys = torch.from_numpy(np.concatenate([*keys, np.full(num_more, NO_KEY)]))

    def find(self, tokens_RB: Tensor) -> Tensor:
        """Which tokens end their canvas, bool [R, B]."""
        wanted = self.first_key + tokens_RB
        return self.keys[torch.searchsorted(self.keys, wanted)] == wanted


def num_stops(lists: Sequence[bytes]) -> int:
    """Entries of the table."""
    return 1 + sum(len(ids) // TOKEN.itemsize for ids in set(lists))
