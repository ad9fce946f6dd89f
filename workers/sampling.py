"""Sampling parameters of a burst as tensors, and what they do to logits: edits, guidance, filters.

Each row of logits is changed by its own canvas's numbers alone. A burst in which nobody uses a parameter has
no table for it and does no work for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remask.scheduler.sampling import Sampling
from remask.workers.staging import HoldsTensors

PAD = -1


class SamplingTables(HoldsTensors):
    """The sampling parameters of R canvases.

    Attributes:
        temperature, top_p, min_p, cfg_scale: fp32 [R].
        top_k: int64 [R]; 0: off.
        rank_by_top: bool [R].
        ranks_as_drawn: bool [R]: what is ranked are probabilities after temperature and filters.
        filters: bool [R]: canvases for which a part of the vocabulary counts.
        reranked: bool [R]: canvases that rank by another softmax than the untempered one.
        entropy_floor: fp32 [R]: what is added to a probability inside the logarithm (Dream's code: 1e-10).
        biased, banned, allowed, unranked: int64 [R, ids] padded with -1, or None where nobody has any.
        bias: fp32 like `biased`.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        def reals(name: str) -> Tensor:
            return torch.tensor([float(getattr(s, name)) for s in samplings])

        def ids(rows: list[list[int]]) -> Tensor | None:
            return _padded(rows, PAD, torch.int64)

        self.temperature, self.top_p, self.min_p = reals("temperature"), reals("top_p"), reals("min_p")
        self.cfg_scale = reals("cfg_scale")
        self.top_k = torch.tensor([s.top_k for s in samplings])
        self.rank_by_top = torch.tensor([s.rank == "top" for s in samplings])
        self.ranks_as_drawn = torch.tensor([s.ranks_as_drawn for s in samplings])
        self.entropy_floor = torch.where(self.ranks_as_drawn, 1e-10, 0.0)
        filters, reranked = [s.filters for s in samplings], [s.reranks for s in samplings]
        self.filters, self.any_filter = torch.tensor(filters), any(filters)
        self.any_narrowed = any(s.ranks_as_drawn and s.filters for s in samplings)
        self.reranked, self.any_reranked = torch.tensor(reranked), any(reranked)
        self.any_hot = any(s.temperature > 0 for s in samplings)
        self.biased = ids([list(s.logit_bias) for s in samplings])
        self.bias = _padded([list(s.logit_bias.values()) for s in samplings], 0.0, torch.float32)
        self.banned, self.allowed, self.unranked = (
            ids([getattr(s, name) for s in samplings])
            for name in ("banned_ids", "allowed_ids", "unranked_ids")
        )

    def edit(self, logits_NV: Tensor, owners_N: Tensor) -> None:
        """Adds the bias and bans ids, in place; `owners_N` are the rows' canvases."""
        if self.biased is not None:
            assert self.bias is not None, "they come together"
            own = self.biased[owners_N]
            logits_NV.scatter_add_(1, own.clamp(min=0), self.bias[owners_N])
        if self.allowed is not None:
            own = self.allowed[owners_N]
            is_limited = (own >= 0).any(1, keepdim=True)
            first = own[:, :1].clamp(min=0)
            own = torch.where(own >= 0, own, first)
            kept = logits_NV.gather(1, own)
            logits_NV.masked_fill_(is_limited, -torch.inf).scatter_(1, own, kept)
        if self.banned is not None:
            ban(logits_NV, self.banned[owners_N])

    def improbable(self, logits_NV: Tensor, owners_N: Tensor) -> Tensor:
        """Which tokens may not be drawn, bool [N, V]; the most probable one always may.

        All three filters keep the beginning of the row sorted by probability (ties: the lower id first).
        """
        ordered, ids = logits_NV.sort(dim=-1, descending=True, stable=True)
        heat, top_p, min_p = (
            table[owners_N].unsqueeze(1) for table in (self._heat(), self.top_p, self.min_p)
        )
        weight = ((ordered - ordered[:, :1]) / heat).double().exp()
        place = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        top_k = self.top_k[owners_N].unsqueeze(1)
        weight = torch.where(((place < top_k) | (top_k == 0)) & (weight >= min_p), weight, 0.0)
        before = weight.cumsum(-1) - weight
        kept = (weight > 0) & ((before < top_p * weight.sum(-1, keepdim=True)) | (place == 0))
        return torch.empty_like(kept).scatter_(1, ids, ~kept)

    def narrow(self, logits_NV: Tensor, impossible_NV: Tensor | None, owners_N: Tensor) -> None:
        """Makes of logits those that are ranked by, in place, for canvases that are `reranked`.

        Args:
            logits_NV: edited logits.
            impossible_NV: tokens that filters leave out, bool [N, V]; None where no ranking is filtered.
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
        """The temperature that tokens' probabilities are taken at: 1 where the most probable is proposed."""
        return torch.where(self.temperature > 0, self.temperature, 1.0)


def ban(logits_NV: Tensor, ids_NK: Tensor) -> None:
    """Sets logits to -inf, in place; ids of -1 are padding."""
    floor = torch.where(ids_NK >= 0, -torch.inf, torch.inf)
    logits_NV.scatter_reduce_(1, ids_NK.clamp(min=0), floor, "amin")


def _padded(rows: list[list], fill: float, dtype: torch.dtype) -> Tensor | None:
    width = max(map(len, rows), default=0)
    if width == 0:
        return None
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)
