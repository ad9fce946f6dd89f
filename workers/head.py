"""The head: from hidden states of candidate rows to a few numbers a row, in chunks of bounded memory.

The [rows, V] tensor never exists whole. Probabilities are fp32 softmax over all V ids, the mask id included;
the mask id is excluded from proposals only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from remask.workers.keyed_random import gumbel
from remask.workers.rows import HeadQuery

# fp32 logits of one chunk; about five times as much is in use at the peak. A CPU wants a chunk to stay in its
# cache, a GPU wants few launches.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Rows that draw tokens, or rank again, are done in chunks this many times smaller: 64-bit words are large.
GUMBEL_SHARE = 8


class Statistics(NamedTuple):
    """What strategies may know about N rows.

    Attributes:
        ids: int64 [2, N]: `proposal`, the token to commit, and `top_token`, the most probable; never M.
        reals: fp32 [7, N]: `proposal_prob`, `top_prob` (the largest of a token that is not M), `given_prob`
            (of the token asked about), `margin` (top_prob minus the second largest; 0 where not needed) and
            `neg_entropy` (sum p log p, in nats; 0 where not needed), of the softmax that is ranked by; and
            `proposal_logprob`, `top_logprob` of the whole, untempered softmax.
    """

    ids: Tensor
    reals: Tensor

    @classmethod
    def blank(cls, num_rows: int, device: torch.device) -> Statistics:
        """Zeros, to be filled row by row."""
        return cls(
            torch.zeros(2, num_rows, dtype=torch.int64, device=device),
            torch.zeros(7, num_rows, device=device),
        )

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
    def proposal_prob(self) -> Tensor:
        return self.reals[0]

    @property
    def top_prob(self) -> Tensor:
        return self.reals[1]

    @property
    def given_prob(self) -> Tensor:
        return self.reals[2]

    @property
    def margin(self) -> Tensor:
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
    """Statistics of the N slots that are asked about.

    Args:
        hidden_HD: final hidden states of the candidates: those of the slots, and of their second copies.
        logits_of: final norm and head: logits [rows, V] of hidden states [rows, D].
        vocab_size: V.
        query: what is asked.
        mask_id: M.
    """
    count = len(query.given)
    out = Statistics.blank(count, hidden_HD.device)
    chunk_len = _chunk_len(hidden_HD.device, vocab_size)
    for start in range(0, count, chunk_len):
        part = slice(start, start + chunk_len)
        logits_NV = _guided_logits(hidden_HD, logits_of, query, part)
        out.put(part, logits_statistics(logits_NV, query, part, mask_id))
    return out


def _guided_logits(
    hidden_HD: Tensor, logits_of: Callable[[Tensor], Tensor], query: HeadQuery, rows: slice
) -> Tensor:
    """fp32 logits of a chunk of the slots: u + (w + 1)(l - u) where there is a second copy."""
    if query.guidance is None:
        return logits_of(hidden_HD[rows]).float()
    logits_NV = logits_of(hidden_HD[query.guidance.first[rows]]).float()
    second = query.guidance.second[rows]
    guided = _those(second >= 0, query)
    scale = query.sampling.cfg_scale[query.owners[rows][guided]].unsqueeze(1) + 1
    unguided = logits_of(hidden_HD[second[guided].clamp(min=0)]).float()
    own = logits_NV[guided]
    both = unguided + scale * (own - unguided)
    logits_NV[guided] = torch.where((second[guided] >= 0).unsqueeze(1), both, own)
    return logits_NV


def _those(flags: Tensor, query: HeadQuery) -> Tensor:
    """Indices of the flagged; where shapes are fixed of all, and what is found for the others is not kept."""
    if query.live is not None:
        return torch.arange(len(flags), device=flags.device)
    return flags.nonzero().squeeze(1)


def logits_statistics(logits_NV: Tensor, query: HeadQuery, rows: slice, mask_id: int) -> Statistics:
    """Statistics of a chunk of logits; overwrites them. `rows` are the chunk's rows in the query."""
    owners, sampling = query.owners[rows], query.sampling
    sampling.edit(logits_NV, owners)
    excluded_NK = _excluded(query, rows, mask_id)
    found, norm_N, held_NK = _ranking(logits_NV, query.given[rows], query.needs, excluded_NK)
    is_hot = query.temperature[rows] > 0
    hot = _those(is_hot, query)
    if len(hot) and (sampling.any_hot or query.live is None):
        drawn = torch.where(is_hot[hot], _draw(logits_NV, query, rows, hot), found.proposal[hot])
        found.proposal[hot] = drawn
        logit = logits_NV[hot].gather(1, drawn.unsqueeze(1)).squeeze(1)
        found.proposal_prob[hot] = logit.exp() / norm_N[hot]
        found.proposal_logprob[hot] = logit - norm_N[hot].log()
    if sampling.any_reranked:
        again = _those(sampling.reranked[owners], query)
        for part in again.split(_chunk_len(logits_NV.device, logits_NV.shape[1], GUMBEL_SHARE)):
            own, ids_NK, part_NV = owners[part], excluded_NK[part], logits_NV[part]
            impossible_NV = sampling.improbable(part_NV, own) if sampling.any_narrowed else None
            part_NV.scatter_(1, ids_NK, held_NK[part])
            sampling.narrow(part_NV, impossible_NV, own)
            ranked, _, _ = _ranking(
                part_NV, found.proposal[part], query.needs, ids_NK, sampling.entropy_floor[own]
            )
            # The proposal stays; its probability, the largest, margin and entropy are those of the ranking.
            is_again = sampling.reranked[own]
            for kind, values in (
                (0, ranked.given_prob),
                (1, ranked.top_prob),
                (3, ranked.margin),
                (4, ranked.neg_entropy),
            ):
                found.reals[kind, part] = torch.where(is_again, values, found.reals[kind, part])
    return found


def _chunk_len(device: torch.device, vocab_size: int, share: int = 1) -> int:
    """Rows of a chunk; with a share, for work that needs `share` times the memory of the logits."""
    num_bytes = CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"]
    return max(1, num_bytes // (4 * share * vocab_size))


def _excluded(query: HeadQuery, rows: slice, mask_id: int) -> Tensor:
    """Ids that may not be proposed, int64 [N, K]: M, and what was removed from a slot for good."""
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
    """Statistics with the most probable tokens as proposals, the softmax's norm, and the logits of what is
    excluded.

    The logits become relative to the row's largest, and those of what is excluded -inf.
    """
    # Relative to the largest, so that probabilities near 1 keep their last bits: policies compare those.
    # (A row of which nothing may be ranked has probabilities of 0.)
    logits_NV -= logits_NV.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    exp_NV = logits_NV.exp()
    norm_N = exp_NV.sum(-1).clamp(min=1)
    neg_entropy = margin = torch.zeros_like(norm_N)
    if "entropy" in needs:
        neg_entropy = _neg_entropy(exp_NV, logits_NV, norm_N, entropy_floor_N)
    del exp_NV
    given_prob = logits_NV.gather(1, given_N.unsqueeze(1)).squeeze(1).exp() / norm_N
    held_NK = _exclude(logits_NV, excluded_NK)
    top_logit, proposal = logits_NV.max(-1)
    top_prob = top_logit.exp() / norm_N
    if "margin" in needs:
        margin = top_prob - logits_NV.topk(2, dim=-1).values[:, 1].exp() / norm_N
    logprob = top_logit - norm_N.log()
    return (
        Statistics(
            torch.stack([proposal, proposal]),
            torch.stack([top_prob, top_prob, given_prob, margin, neg_entropy, logprob, logprob]),
        ),
        norm_N,
        held_NK,
    )


def _neg_entropy(exp_NV: Tensor, logits_NV: Tensor, norm_N: Tensor, floor_N: Tensor | None) -> Tensor:
    """sum p log p, or sum p log(p + floor) where there is one; overwrites `exp_NV`."""
    if floor_N is None:
        return exp_NV.mul_(logits_NV).nansum(-1) / norm_N - norm_N.log()
    p_NV = exp_NV.div_(norm_N.unsqueeze(1))
    return (p_NV * (p_NV + floor_N.unsqueeze(1)).log()).nansum(-1)


def _exclude(logits_NV: Tensor, excluded_NK: Tensor) -> Tensor:
    """Sets the logits of ids to -inf, in place, and returns what they were; the first of them is M.

    Where nothing would be left to propose, only M is excluded.
    """
    held_NK = logits_NV.gather(1, excluded_NK)
    logits_NV.scatter_(1, excluded_NK, -torch.inf)
    if excluded_NK.shape[1] > 1:
        is_empty = logits_NV.amax(-1, keepdim=True).isneginf()
        may_return = is_empty & (excluded_NK != excluded_NK[:, :1])
        logits_NV.scatter_(1, excluded_NK, torch.where(may_return, held_NK, -torch.inf))
    return held_NK


def _draw(logits_NV: Tensor, query: HeadQuery, rows: slice, hot: Tensor) -> Tensor:
    """Tokens drawn for the rows `hot` of a chunk: the Gumbel maximum of the tempered and filtered logits."""
    sampling, vocab = query.sampling, torch.arange(logits_NV.shape[1], device=logits_NV.device)
    drawn = []
    for part in hot.split(_chunk_len(vocab.device, len(vocab), GUMBEL_SHARE)):
        owners = query.owners[rows][part]
        heat = query.temperature[rows][part].unsqueeze(1)
        scores_NV = gumbel(query.keys[rows][part], vocab).mul_(heat).add_(logits_NV[part])
        if sampling.any_filter:
            filtered = _those(sampling.filters[owners], query)
            impossible = sampling.improbable(logits_NV[part][filtered], owners[filtered])
            impossible &= sampling.filters[owners[filtered]].unsqueeze(1)
            scores_NV[filtered] = scores_NV[filtered].masked_fill(impossible, -torch.inf)
        drawn.append(scores_NV.argmax(-1))
    return torch.cat(drawn)
