"""The head: from hidden states of candidate rows to a few numbers a row, in chunks of bounded memory.

The [rows, V] tensor never exists whole. Log-probabilities are those of the fp32 softmax over all V ids, the
mask id included; the mask id is excluded from proposals only. A row's largest logit stands apart from the sum
of the others: a log-probability near 0 is minus that sum, so that 1 - 1e-9 and 1 - 2e-9 differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from remask.workers.keyed_random import gumbel
from remask.workers.row_sums import row_sums
from remask.workers.rows.pack import HeadQuery

# fp32 logits of one chunk; about five times as much is in use at the peak. A CPU wants a chunk to stay in its
# cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Rows that draw tokens, or rank again, are done in chunks this many times smaller: 64-bit words are large.
GUMBEL_SHARE = 8


class Statistics(NamedTuple):
    """The statistics of N rows that policies may read.

    Attributes:
        ids: int64 [2, N]: `proposal`, the token to commit, and `top_token`, the most probable; never M.
        reals: fp32 [7, N]. Of the softmax that ranks: `log_proposal`, `log_top` (the largest of a token that
            is not M), `log_given` (of the given token), `log_margin` (log of the largest probability minus
            the second largest; -inf if not needed) and `neg_entropy` (sum p log p, in nats; 0 if not
            needed). Of the whole, untempered softmax: `proposal_logprob`, `top_logprob`.
    """

    ids: Tensor
    reals: Tensor

    @classmethod
    def blank(cls, num_rows: int, device: torch.device) -> Statistics:
        """Ids of 0 without probability or entropy, to be filled row by row."""
        reals = torch.full((7, num_rows), -torch.inf, device=device)
        reals[4].zero_()
        return cls(torch.zeros(2, num_rows, dtype=torch.int64, device=device), reals)

    def part(self, rows: slice) -> Statistics:
        """The statistics of some rows."""
        return Statistics(self.ids[:, rows], self.reals[:, rows])

    def put(self, rows: Tensor | slice, other: Statistics) -> None:
        """Writes the statistics of some rows."""
        self.ids[:, rows], self.reals[:, rows] = other.ids, other.reals

    @property
    def proposal(self) -> Tensor:
        return self.ids[0]

    @property
    def top_token(self) -> Tensor:
        return self.ids[1]

    @property
    def log_proposal(self) -> Tensor:
        return self.reals[0]

    @property
    def log_top(self) -> Tensor:
        return self.reals[1]

    @property
    def log_given(self) -> Tensor:
        return self.reals[2]

    @property
    def log_margin(self) -> Tensor:
        return self.reals[3]

    @property
    def neg_entropy(self) -> Tensor:
        return self.reals[4]

    @property
    def proposal_logprob(self) -> Tensor:
        return self.reals[5]

    @property
    def top_logprob(self) -> Tensor:
        return self.reals[6]


def head_statistics(
    hidden_HD: Tensor, logits_of: Callable[[Tensor], Tensor], vocab_size: int, query: HeadQuery, mask_id: int
) -> Statistics:
    """Statistics of the N slots of a query.

    Args:
        hidden_HD: final hidden states of the candidates: those of the slots, and of their second copies.
        logits_of: final norm and head: logits [rows, V] of hidden states [rows, D].
        vocab_size: V.
        query: the questions about the slots.
        mask_id: M.
    """
    count, chunk_len = len(query.given), _chunk_len(hidden_HD.device, vocab_size)
    parts = [slice(start, start + chunk_len) for start in range(0, max(1, count), chunk_len)]
    found = [
        logits_statistics(_guided_logits(hidden_HD, logits_of, query, part), query, part, mask_id)
        for part in parts
    ]
    return Statistics(*(torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True)))


def _guided_logits(
    hidden_HD: Tensor, logits_of: Callable[[Tensor], Tensor], query: HeadQuery, rows: slice
) -> Tensor:
    """fp32 logits of a chunk of the slots; u + (w + 1)(l - u) if the canvas has a second copy."""
    if query.hidden is None:
        return logits_of(hidden_HD[rows]).float()
    logits_NV = logits_of(hidden_HD[query.hidden.first[rows]]).float()
    if query.hidden.second is None:
        return logits_NV
    second = query.hidden.second[rows]
    guided = _flagged_rows(second >= 0, query)
    scale = query.sampling.cfg_scale[query.owners[rows][guided]].unsqueeze(1) + 1
    unguided = logits_of(hidden_HD[second[guided].clamp(min=0)]).float()
    own = logits_NV[guided]
    both = unguided + scale * (own - unguided)
    logits_NV[guided] = torch.where((second[guided] >= 0).unsqueeze(1), both, own)
    return logits_NV


def _flagged_rows(flags: Tensor, query: HeadQuery) -> Tensor:
    """Indices of flagged rows. With static shapes, all rows; results for unflagged rows are discarded."""
    if query.live is not None:
        return torch.arange(len(flags), device=flags.device)
    return flags.nonzero().squeeze(1)


def logits_statistics(logits_NV: Tensor, query: HeadQuery, rows: slice, mask_id: int) -> Statistics:
    """Statistics of a chunk of logits; overwrites them. `rows` are the chunk's rows in the query."""
    owners, sampling = query.owners[rows], query.sampling
    sampling.edit(logits_NV, owners)
    excluded_NK = _excluded(query, rows, mask_id)
    found, log_norm_N, held_NK = _ranking(logits_NV, query.given[rows], query.needs, excluded_NK)
    if query.keys is not None:
        is_hot = query.temperature[rows] > 0
        hot = _flagged_rows(is_hot, query)
        drawn = torch.where(
            is_hot[hot], _draw(logits_NV, query, query.keys[rows], rows, hot), found.proposal[hot]
        )
        found.proposal[hot] = drawn
        found.log_proposal[hot] = found.proposal_logprob[hot] = logits_NV[hot, drawn] - log_norm_N[hot]
    if sampling.any_reranked:
        again = _flagged_rows(sampling.reranked[owners], query)
        for part in again.split(_chunk_len(logits_NV.device, logits_NV.shape[1], GUMBEL_SHARE)):
            own, ids_NK, part_NV = owners[part], excluded_NK[part], logits_NV[part]
            impossible_NV = (
                sampling.improbable(part_NV, own, static_shapes=query.live is not None)
                if sampling.any_narrowed
                else None
            )
            part_NV.scatter_(1, ids_NK, held_NK[part])
            sampling.narrow(part_NV, impossible_NV, own)
            ranked, _, _ = _ranking(
                part_NV, found.proposal[part], query.needs, ids_NK, sampling.entropy_floor[own]
            )
            # The proposal stays; its probability, the largest, margin and entropy are those of the ranking.
            is_again = sampling.reranked[own]
            for kind, values in (
                (0, ranked.log_given),
                (1, ranked.log_top),
                (3, ranked.log_margin),
                (4, ranked.neg_entropy),
            ):
                found.reals[kind, part] = torch.where(is_again, values, found.reals[kind, part])
    return found


def _chunk_len(device: torch.device, vocab_size: int, share: int = 1) -> int:
    """Rows of a chunk; with a share, for work that needs `share` times the memory of the logits."""
    num_bytes = CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"]
    return max(1, num_bytes // (4 * share * vocab_size))


def _excluded(query: HeadQuery, rows: slice, mask_id: int) -> Tensor:
    """Ids that may not be proposed, int64 [N, K]: M, and the tokens that were removed from the slot."""
    removed_NK = query.removed[rows] if query.removed is not None else None
    count = len(query.given[rows])
    mask_N1 = torch.full((count, 1), mask_id, device=query.given.device)
    if removed_NK is None:
        return mask_N1
    return torch.cat([mask_N1, torch.where(removed_NK >= 0, removed_NK, mask_id)], dim=1)


def _ranking(
    logits_NV: Tensor,
    given_N: Tensor,
    needs: frozenset[str],
    excluded_NK: Tensor,
    entropy_floor_N: Tensor | None = None,
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics with the most probable tokens as proposals, the log of the softmax's norm, and the logits of
    the excluded ids.

    The logits become relative to the row's largest, and those of excluded ids -inf.
    """
    given_N1 = logits_NV.gather(1, given_N.unsqueeze(1))
    held_NK, apart_NK = _exclude(logits_NV, excluded_NK)
    apart_N1 = apart_NK if apart_NK.shape[1] == 1 else _log_sums(apart_NK)
    top_N1, proposal_N1 = logits_NV.max(-1, keepdim=True)
    # (A row of which nothing may be ranked has probabilities of 0.)
    base_N1 = torch.maximum(top_N1, apart_N1).clamp_(min=torch.finfo(torch.float32).min)
    logits_NV -= base_N1
    exp_NV = logits_NV.exp().scatter_(1, proposal_N1, 0.0)
    others_N1 = row_sums(exp_NV).add_((torch.minimum(top_N1, apart_N1) - base_N1).exp_())
    log_norm_N1 = others_N1.log1p()
    top_N1 -= base_N1
    log_top = top_N1 - log_norm_N1
    if "entropy" in needs:
        few = torch.cat([top_N1, apart_NK - base_N1], dim=1)
        neg_entropy = _neg_entropy(exp_NV, logits_NV, few, log_norm_N1, entropy_floor_N)
    else:
        neg_entropy = torch.zeros_like(log_top)
    del exp_NV
    if "margin" in needs:
        logits_NV.scatter_(1, proposal_N1, -torch.inf)
        log_margin = _log_margin(log_top, top_N1 - logits_NV.amax(-1, keepdim=True))
        logits_NV.scatter_(1, proposal_N1, top_N1)
    else:
        log_margin = torch.full_like(log_top, -torch.inf)
    log_given = (given_N1 - base_N1).sub_(log_norm_N1)
    reals = torch.cat([log_top, log_top, log_given, log_margin, neg_entropy, log_top, log_top])
    ids, count = torch.cat([proposal_N1, proposal_N1]), len(logits_NV)
    return Statistics(ids.view(2, count), reals.view(7, count)), log_norm_N1.squeeze(1), held_NK.sub_(base_N1)


def _neg_entropy(
    exp_NV: Tensor, logits_NV: Tensor, few: Tensor, log_norm_N1: Tensor, floor_N: Tensor | None
) -> Tensor:
    """sum p log p, or sum p log(p + floor) where there is one, fp32 [N, 1]; overwrites `exp_NV`.

    Args:
        exp_NV: weights of most tokens; 0 for those of the few.
        logits_NV: their logarithms.
        few: logarithms of those of the few that stand apart, the largest among them.
        log_norm_N1: that of the sum of all weights.
        floor_N: see `SamplingTables.entropy_floor`.
    """
    if floor_N is None:
        moment_N1 = row_sums(exp_NV.mul_(logits_NV), skip_nan=True)
        moment_N1 += _in_order(few.mul_(few.exp()))
        return moment_N1 / log_norm_N1.exp() - log_norm_N1
    floor_N1, p_NV, log_few = floor_N.unsqueeze(1), exp_NV.div_(log_norm_N1.exp()), few - log_norm_N1
    most = row_sums(p_NV * (p_NV + floor_N1).log(), skip_nan=True)
    p_few = log_few.exp()
    return most + _in_order(p_few * (log_few + (floor_N1 / p_few).log1p()))


def _log_sums(logits_NK: Tensor) -> Tensor:
    """log of the sum of exp of each row, [N, 1]; -inf adds nothing."""
    largest_N1 = logits_NK.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    return largest_N1 + _in_order((logits_NK - largest_N1).exp()).log()


def _in_order(values_NK: Tensor) -> Tensor:
    """The sum of each row, [N, 1], from left to right without NaN. K is that of the canvas with most removed
    tokens: zeros at the end of a row change no bit of it."""
    return values_NK.masked_fill(values_NK.isnan(), 0.0).cumsum(1)[:, -1:]


def _log_margin(log_top: Tensor, gap: Tensor) -> Tensor:
    """log(p1 - p2) of log p1 and log p1 - log p2; -inf where both probabilities are 0."""
    log_share = torch.where(gap < math.log(2), (-(-gap).expm1()).log(), (-(-gap).exp()).log1p())
    return torch.where(log_top.isneginf(), log_top, log_top + log_share)


def _exclude(logits_NV: Tensor, excluded_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Sets the logits of ids to -inf, in place; the first of them is M, which later ones may repeat.

    Where nothing would be left to propose, only M is excluded.

    Returns:
        What the logits were, and of those that stay excluded the same with -inf for repetitions, [N, K] each.
    """
    held_NK = logits_NV.gather(1, excluded_NK)
    logits_NV.scatter_(1, excluded_NK, -torch.inf)
    if excluded_NK.shape[1] == 1:
        return held_NK, held_NK
    is_empty = logits_NV.amax(-1, keepdim=True).isneginf()
    is_mask = excluded_NK == excluded_NK[:, :1]
    logits_NV.scatter_(1, excluded_NK, torch.where(is_empty & ~is_mask, held_NK, -torch.inf))
    apart_NK = torch.where(is_empty | is_mask, -torch.inf, held_NK)
    apart_NK[:, 0] = held_NK[:, 0]
    return held_NK, apart_NK


def _draw(logits_NV: Tensor, query: HeadQuery, keys_N: Tensor, rows: slice, hot: Tensor) -> Tensor:
    """Tokens drawn for the rows `hot` of a chunk: the Gumbel maximum of the tempered and filtered logits."""
    sampling, vocab = query.sampling, torch.arange(logits_NV.shape[1], device=logits_NV.device)
    drawn = []
    for part in hot.split(_chunk_len(vocab.device, len(vocab), GUMBEL_SHARE)):
        owners = query.owners[rows][part]
        heat = query.temperature[rows][part].unsqueeze(1)
        scores_NV = gumbel(keys_N[part], vocab).mul_(heat).add_(logits_NV[part])
        if sampling.any_filter:
            filtered = _flagged_rows(sampling.filters[owners], query)
            impossible = sampling.improbable(
                logits_NV[part][filtered], owners[filtered], static_shapes=query.live is not None
            )
            impossible &= sampling.filters[owners[filtered]].unsqueeze(1)
            scores_NV[filtered] = scores_NV[filtered].masked_fill(impossible, -torch.inf)
        drawn.append(scores_NV.argmax(-1))
    return torch.cat(drawn)
