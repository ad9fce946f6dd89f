"""Sampling parameters of a burst as tensors, and what they do to logits: edits, guidance, filters.

Each row of logits is changed only by its own canvas's parameters. A burst in which no canvas uses a parameter
has no table for it and does no work for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.sampling import BIAS, TOKEN, Sampling
from remask.workers.filters import Filters, improbable, reach_of
from remask.workers.tensors import HoldsTensors, column

PAD = -1


class LogitEdits(HoldsTensors):
    """What is done to the logits of R canvases before everything else.

    Canvases with equal lists, like the samples of a prompt, share an *edit*; there are E of them, and
    canvases without a list have edit E. All lists are concatenated, so the length of the tables is the sum of
    the lists' lengths.

    Attributes:
        edit: int64 [R]: the edit of each canvas.
        floor: fp32 [E + 1]: added to all logits: -inf if the edit has a list of allowed ids.
        allowed, banned, biased: int64 [2, entries]: edits and ids.
        bias: fp32 [entries].
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        lists_R = [edit_lists(sampling) for sampling in samplings]
        numbers = {lists: number for number, lists in enumerate(dict.fromkeys(filter(any, lists_R)))}
        self.edit = torch.tensor([numbers.get(lists, len(numbers)) for lists in lists_R], dtype=torch.int64)
        allowed = [np.frombuffer(lists[0], TOKEN) for lists in numbers]
        biases = [np.frombuffer(lists[2], BIAS) for lists in numbers]
        self.floor = torch.tensor([*(-torch.inf if len(ids) else 0.0 for ids in allowed), 0.0])
        self.allowed = _entries(allowed)
        self.banned = _entries([np.frombuffer(lists[1], TOKEN) for lists in numbers])
        self.biased = _entries([bias["id"] for bias in biases])
        self.bias = torch.from_numpy(np.concatenate([bias["bias"] for bias in biases]))

    def apply(self, logits_NV: Tensor, owners_N: Tensor) -> None:
        """Edits logits in place; `owners_N` are the rows' canvases.

        What is added to each logit is written into a table with a line for each edit of these rows, which is
        no larger than the logits however many canvases there are.
        """
        num_rows, vocab_size = logits_NV.shape
        num_edits = len(self.floor) - 1
        num_lines = min(num_rows, num_edits)
        edit_N = self.edit[owners_N]
        is_here = torch.zeros_like(self.floor, dtype=torch.int64).index_fill_(0, edit_N, 1)
        # Behind the lines of the edits there is one for rows without, and one for edits of no row here.
        line = torch.where(is_here > 0, is_here.cumsum(0) - 1, num_lines + 1)
        line = torch.where(torch.arange(num_edits + 1, device=line.device) == num_edits, num_lines, line)
        floor = torch.zeros(num_lines + 2, device=line.device).scatter_(0, line, self.floor)
        added = floor.unsqueeze(1).repeat(1, vocab_size)

        def places(entries: Tensor) -> Tensor:
            return line[entries[0]] * vocab_size + entries[1]

        flat = added.view(-1)
        flat.index_fill_(0, places(self.allowed), 0.0)
        flat.index_add_(0, places(self.biased), self.bias)
        flat.index_fill_(0, places(self.banned), -torch.inf)
        logits_NV += added[line[edit_N]]


class SamplingTables(HoldsTensors):
    """The sampling parameters of R canvases.

    Attributes:
        temperature, top_p, cfg_scale: fp32 [R].
        reach: fp32 [R]: how far below the row's largest a logit may be, divided by the temperature.
        top_k: int64 [R]; 0: off.
        max_k: the largest of them.
        any_share: whether any canvas limits the share of the probability without a `top_k`.
        rank_by_top: bool [R].
        ranks_as_drawn: bool [R]: whether ranking uses the probabilities after temperature and filters.
        filters: bool [R]: canvases for which a part of the vocabulary counts.
        reranked: bool [R]: canvases that rank by another softmax than the untempered one.
        entropy_floor: fp32 [R]: added to a probability inside the logarithm (Dream's code: 1e-10).
        edits: the bias, and ids that are banned; None: no canvas has any.
        unranked: int64 [R, ids] padded with -1; None if no canvas has any.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.temperature = column([s.temperature for s in samplings], np.float32)
        self.top_p = column([s.top_p for s in samplings], np.float32)
        self.cfg_scale = column([s.cfg_scale for s in samplings], np.float32)
        self.reach = torch.tensor([reach_of(s.min_p) for s in samplings])
        self.top_k = column([s.top_k for s in samplings], np.int64)
        self.max_k = max(s.top_k * s.filters for s in samplings)
        self.any_share = any(s.filters and s.top_p < 1 and s.top_k == 0 for s in samplings)
        self.rank_by_top = column([s.rank == "top" for s in samplings], np.bool_)
        self.ranks_as_drawn = column([s.ranks_as_drawn for s in samplings], np.bool_)
        self.entropy_floor = torch.where(self.ranks_as_drawn, 1e-10, 0.0)
        filters, reranked = [s.filters for s in samplings], [s.reranks for s in samplings]
        self.filters, self.any_filter = column(filters, np.bool_), any(filters)
        self.any_narrowed = any(s.ranks_as_drawn and s.filters for s in samplings)
        self.reranked, self.any_reranked = column(reranked, np.bool_), any(reranked)
        self.any_hot = any(s.temperature > 0 for s in samplings)
        self.edits = LogitEdits(samplings) if any(any(edit_lists(s)) for s in samplings) else None
        self.unranked = _padded([s.unranked_ids for s in samplings])

    def edit(self, logits_NV: Tensor, owners_N: Tensor) -> None:
        """Adds the bias and bans ids, in place; `owners_N` are the rows' canvases."""
        if self.edits is not None:
            self.edits.apply(logits_NV, owners_N)

    def improbable(self, logits_NV: Tensor, owners_N: Tensor, *, static_shapes: bool) -> Tensor:
        """Which tokens may not be drawn, bool [N, V]; see `remask.workers.filters.improbable`."""
        heat, reach, top_k, top_p = (
            table[owners_N].unsqueeze(1) for table in (self._heat(), self.reach, self.top_k, self.top_p)
        )
        filters = Filters(heat, reach, top_k, top_p, self.max_k, self.any_share)
        return improbable(logits_NV, filters, static_shapes=static_shapes)

    def narrow(self, logits_NV: Tensor, impossible_NV: Tensor | None, owners_N: Tensor) -> None:
        """Makes of logits those that are ranked by, in place, for canvases that are `reranked`.

        Args:
            logits_NV: edited logits.
            impossible_NV: tokens that filters leave out, bool [N, V]; None if no ranking is filtered.
            owners_N: the rows' canvases.
        """
        as_drawn = self.ranks_as_drawn[owners_N].unsqueeze(1)
        logits_NV /= torch.where(as_drawn, self._heat()[owners_N].unsqueeze(1), 1.0)
        if impossible_NV is not None:
            narrows = as_drawn & self.filters[owners_N].unsqueeze(1)
            logits_NV.masked_fill_(impossible_NV & narrows, -torch.inf)
        if self.unranked is not None:
            ban(logits_NV, self.unranked[owners_N])

    def _heat(self) -> Tensor:
        """The temperature that tokens' probabilities are taken at: 1 if the most probable is proposed."""
        return torch.where(self.temperature > 0, self.temperature, 1.0)


def edit_lists(sampling: Sampling) -> tuple[bytes, bytes, bytes]:
    """Allowed and banned ids and the bias."""
    return sampling.allowed_ids, sampling.banned_ids, sampling.logit_bias


def _entries(lists: Sequence[np.ndarray]) -> Tensor:
    """Lists of ids as one, int64 [2, entries]: the place of each id's list, and the id."""
    places = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    return torch.from_numpy(np.stack([places, np.concatenate(lists).astype(np.int64)]))


def ban(logits_NV: Tensor, ids_NK: Tensor) -> None:
    """Sets logits to -inf, in place; ids of -1 are padding."""
    floor = torch.where(ids_NK >= 0, -torch.inf, torch.inf)
    logits_NV.scatter_reduce_(1, ids_NK.clamp(min=0), floor, "amin")


def _padded(rows: Sequence[list[int]]) -> Tensor | None:
    width = max(map(len, rows), default=0)
    if width == 0:
        return None
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64)
