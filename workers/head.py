"""The head: from hidden states of candidate rows to a few numbers a row, in chunks of bounded memory.

The [rows, V] tensor never exists whole. Probabilities are fp32 softmax over all V ids, the mask id included;
the mask id is excluded from proposals only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from remask.workers.keyed_random import gumbel
from remask.workers.rows import HeadQuery
from remask.workers.sampling import ban

CHUNK_BYTES = 32 << 20  # fp32 logits of one chunk; about five times as much is in use at the peak
GUMBEL_SHARE = 8  # rows that draw tokens are done in chunks this many times smaller: 64-bit words are large


@dataclass(frozen=True)
class Statistics:
    """What strategies may know about N rows.

    Attributes:
        proposal: int64 [N]: the token to commit, never M.
        proposal_prob: fp32 [N]: its probability.
        top_prob: fp32 [N]: the largest probability of a token that is not M.
        given_prob: fp32 [N]: probability of the token asked about.
        margin: fp32 [N]: top_prob minus the second largest; 0 where not needed.
        neg_entropy: fp32 [N]: sum p log p, in nats; 0 where not needed.
    """

    proposal: Tensor
    proposal_prob: Tensor
    top_prob: Tensor
    given_prob: Tensor
    margin: Tensor
    neg_entropy: Tensor

    @classmethod
    def blank(cls, num_rows: int, device: torch.device) -> Statistics:
        """Zeros, to be filled row by row."""
        reals = (torch.zeros(num_rows, device=device) for _ in range(5))
        return cls(torch.zeros(num_rows, dtype=torch.int64, device=device), *reals)

    def part(self, rows: slice) -> Statistics:
        """The statistics of some rows."""
        return Statistics(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor | slice, other: Statistics) -> None:
        """Writes the statistics of some rows."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


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
    chunk_len = max(1, CHUNK_BYTES // (4 * vocab_size))
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
    guided = (second >= 0).nonzero().squeeze(1)
    scale = query.sampling.cfg_scale[query.owners[rows][guided]].unsqueeze(1) + 1
    unguided = logits_of(hidden_HD[second[guided]]).float()
    logits_NV[guided] = unguided + scale * (logits_NV[guided] - unguided)
    return logits_NV


def logits_statistics(logits_NV: Tensor, query: HeadQuery, rows: slice, mask_id: int) -> Statistics:
    """Statistics of a chunk of logits; overwrites them. `rows` are the chunk's rows in the query."""
    owners, sampling = query.owners[rows], query.sampling
    sampling.edit(logits_NV, owners)
    found, norm_N, mask_logit_N = _ranking(logits_NV, query.given[rows], query.needs, mask_id)
    proposal, proposal_prob = found.proposal, found.proposal_prob
    hot = (query.temperature[rows] > 0).nonzero().squeeze(1)
    if len(hot):
        proposal[hot] = _draw(logits_NV, query, rows, hot)
        proposal_prob = logits_NV.gather(1, proposal.unsqueeze(1)).squeeze(1).exp() / norm_N
    found = replace(found, proposal_prob=proposal_prob)
    if sampling.unranked is not None:
        unranked = sampling.unranked[owners]
        limited = (unranked >= 0).any(1).nonzero().squeeze(1)
        again_NV = logits_NV[limited]
        again_NV[:, mask_id] = mask_logit_N[limited]
        ban(again_NV, unranked[limited])
        ranked, _, _ = _ranking(again_NV, proposal[limited], query.needs, mask_id)
        found.put(
            limited,
            replace(
                ranked,
                proposal=proposal[limited],
                proposal_prob=ranked.given_prob,
                given_prob=found.given_prob[limited],
            ),
        )
    return found


def _ranking(
    logits_NV: Tensor, given_N: Tensor, needs: frozenset[str], mask_id: int
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics with the most probable tokens as proposals, the softmax's norm, and M's logit.

    The logits become relative to the row's largest, and those of M -inf.
    """
    # Relative to the largest, so that probabilities near 1 keep their last bits: policies compare those.
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.exp()
    norm_N = exp_NV.sum(-1)
    neg_entropy = margin = torch.zeros_like(norm_N)
    if "entropy" in needs:
        neg_entropy = (exp_NV.mul_(logits_NV)).nansum(-1) / norm_N - norm_N.log()
    del exp_NV
    given_prob = logits_NV.gather(1, given_N.unsqueeze(1)).squeeze(1).exp() / norm_N
    mask_logit_N = logits_NV[:, mask_id].clone()
    logits_NV[:, mask_id] = -torch.inf
    top_logit, proposal = logits_NV.max(-1)
    top_prob = top_logit.exp() / norm_N
    if "margin" in needs:
        margin = top_prob - logits_NV.topk(2, dim=-1).values[:, 1].exp() / norm_N
    return (
        Statistics(proposal, top_prob.clone(), top_prob, given_prob, margin, neg_entropy),
        norm_N,
        mask_logit_N,
    )


def _draw(logits_NV: Tensor, query: HeadQuery, rows: slice, hot: Tensor) -> Tensor:
    """Tokens drawn for the rows `hot` of a chunk: the Gumbel maximum of the tempered and filtered logits."""
    sampling, vocab = query.sampling, torch.arange(logits_NV.shape[1], device=logits_NV.device)
    drawn = []
    for part in hot.split(max(1, CHUNK_BYTES // (4 * GUMBEL_SHARE * len(vocab)))):
        owners = query.owners[rows][part]
        heat = query.temperature[rows][part].unsqueeze(1)
        scores_NV = gumbel(query.keys[rows][part], vocab).mul_(heat).add_(logits_NV[part])
        if sampling.any_filter:
            filtered = sampling.filters[owners].nonzero().squeeze(1)
            impossible = sampling.improbable(logits_NV[part][filtered], owners[filtered])
            scores_NV[filtered] = scores_NV[filtered].masked_fill(impossible, -torch.inf)
        drawn.append(scores_NV.argmax(-1))
    return torch.cat(drawn)
