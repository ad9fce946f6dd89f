"""The head: from hidden states of candidate rows to a few numbers a row, in chunks of bounded memory.

The [rows, V] tensor never exists whole. Probabilities are fp32 softmax over all V ids, the mask id included;
the mask id is excluded from proposals only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from remask.workers.keyed_random import gumbel
from remask.workers.rows import HeadQuery

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
    hidden_ND: Tensor, logits_of: Callable[[Tensor], Tensor], vocab_size: int, query: HeadQuery, mask_id: int
) -> Statistics:
    """Statistics [N] of the candidates.

    Args:
        hidden_ND: final hidden states of the candidates.
        logits_of: final norm and head: logits [rows, V] of hidden states [rows, D].
        vocab_size: V.
        query: what is asked.
        mask_id: M.
    """
    out = Statistics.blank(len(hidden_ND), hidden_ND.device)
    chunk_len = max(1, CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, len(hidden_ND), chunk_len):
        part = slice(start, start + chunk_len)
        logits_NV = logits_of(hidden_ND[part]).float()
        out.put(part, logits_statistics(logits_NV, query, part, mask_id))
    return out


def logits_statistics(logits_NV: Tensor, query: HeadQuery, rows: slice, mask_id: int) -> Statistics:
    """Statistics of a chunk of logits; overwrites them. `rows` are the chunk's rows in the query."""
    # Relative to the largest, so that probabilities near 1 keep their last bits: policies compare those.
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.exp()
    norm_N = exp_NV.sum(-1)
    neg_entropy = margin = torch.zeros_like(norm_N)
    if "entropy" in query.needs:
        neg_entropy = (exp_NV.mul_(logits_NV)).nansum(-1) / norm_N - norm_N.log()
    del exp_NV

    def prob_of(ids_N: Tensor) -> Tensor:
        return logits_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1).exp() / norm_N

    given_prob = prob_of(query.given[rows])
    logits_NV[:, mask_id] = -torch.inf
    top_logit, proposal = logits_NV.max(-1)
    top_prob = top_logit.exp() / norm_N
    if "margin" in query.needs:
        margin = top_prob - logits_NV.topk(2, dim=-1).values[:, 1].exp() / norm_N
    heat = query.temperature[rows]
    hot = (heat > 0).nonzero().squeeze(1)
    vocab = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    for part in hot.split(max(1, CHUNK_BYTES // (4 * GUMBEL_SHARE * len(vocab)))):
        noise_NV = gumbel(query.keys[rows][part], vocab)
        proposal[part] = noise_NV.mul_(heat[part].unsqueeze(1)).add_(logits_NV[part]).argmax(-1)
    return Statistics(proposal, prob_of(proposal), top_prob, given_prob, margin, neg_entropy)
