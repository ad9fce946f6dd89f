"""The head against the dense computation, its sampling, and its memory."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from remask.scheduler.sampling import Sampling
from remask.workers import head
from remask.workers.head import Statistics, head_statistics
from remask.workers.keyed_random import gumbel, stream_keys
from remask.workers.rows.pack import HeadQuery
from remask.workers.sampling import SamplingTables

MASK = 3
PLAIN = Sampling()


def query(count: int, vocab: int, *, heat: float = 0.0, sampling: Sampling = PLAIN) -> HeadQuery:
    generator = torch.Generator().manual_seed(count)
    return HeadQuery(
        owners=torch.zeros(count, dtype=torch.int64),
        sampling=SamplingTables([sampling]),
        given=torch.randint(vocab, (count,), generator=generator),
        temperature=torch.full((count,), heat),
        keys=stream_keys(torch.arange(count)),
        needs=frozenset({"margin", "entropy"}),
    )


def statistics(logits: Tensor, asked: HeadQuery) -> Statistics:
    return head_statistics(logits, torch.clone, logits.shape[1], asked, MASK)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 3000.0])
def test_statistics_equal_the_dense_ones(scale: float) -> None:
    logits = torch.randn(40, 97, generator=torch.Generator().manual_seed(0)) * scale
    asked = query(40, 97)
    found = statistics(logits, asked)
    p = logits.double().softmax(-1)
    without_mask = p.clone()
    without_mask[:, MASK] = -1
    top = without_mask.topk(2, dim=-1)
    assert torch.equal(found.proposal, top.indices[:, 0])
    entropy = -torch.special.entr(p).sum(-1)
    for ours, dense in (
        (found.log_top.exp(), top.values[:, 0]),
        (found.log_proposal.exp(), top.values[:, 0]),
        (found.log_given.exp(), p.gather(1, asked.given.unsqueeze(1)).squeeze(1)),
        (found.log_margin.exp(), top.values[:, 0] - top.values[:, 1]),
        (found.neg_entropy, entropy),
    ):
        torch.testing.assert_close(ours.double(), dense, rtol=2e-5, atol=2e-6)


DOUBTS = [0.3, 1e-3, 1e-6, 2e-9, 1e-9, 3e-12, 1e-12, 3e-16, 1e-16, 1e-30]


def nearly_sure(doubts: list[float], vocab: int, mask_share: float) -> Tensor:
    """Logits [N, V] whose first token has a probability of 1 - doubt; M has a share of the doubt, the others
    share the rest equally but for the second, which has twice as much."""
    shares = torch.full((vocab,), (1 - mask_share) / (vocab - 1), dtype=torch.float64)
    shares[1], shares[MASK], shares[0] = 2 * shares[1], mask_share, 0
    p = torch.tensor(doubts, dtype=torch.float64).unsqueeze(1) * shares
    p[:, 0] = 1 - torch.tensor(doubts, dtype=torch.float64)
    return p.log().float()


def exact(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p1, log(p1 - p2) and sum p log p of the softmax, in fp64 without cancellation. The first logit must
    be the largest."""
    gaps = logits[:, 1:].double() - logits[:, :1].double()
    others = gaps.exp().sum(1)
    moment = torch.nansum(gaps.exp() * gaps, 1)
    gaps[:, MASK - 1] = -torch.inf
    log_margin = -others.log1p() + (-gaps.amax(1).exp()).log1p()
    return -others.log1p(), log_margin, moment / (1 + others) - others.log1p()


@pytest.mark.parametrize("mask_share", [0.0, 0.5])
@pytest.mark.parametrize(
    "sampling", [PLAIN, Sampling(unranked_ids=[90]), Sampling(ranks_as_drawn=True)], ids=str
)
def test_probabilities_that_differ_by_less_than_1e_9_have_different_logarithms(
    sampling: Sampling, mask_share: float
) -> None:
    logits = nearly_sure(DOUBTS, 97, mask_share)
    log_top, log_margin, neg_entropy = exact(logits)
    asked = query(len(DOUBTS), 97, sampling=sampling)
    asked.given.zero_()
    found = statistics(logits, asked)
    rtol = 0.02 if sampling.unranked_ids else 1e-6  # what is ranked by has lost one of the small tokens
    for ours in (found.log_top, found.log_proposal):
        torch.testing.assert_close(ours.double(), log_top, rtol=rtol, atol=0)
        assert (ours.diff() > 0).all()
    for ours in (found.log_given, found.top_logprob, found.proposal_logprob):
        torch.testing.assert_close(ours.double(), log_top, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_margin.double(), log_margin, rtol=rtol, atol=0)
    assert (found.log_margin.diff() > 0).all()
    # Dream's floor of 1e-10 weighs where probabilities are no larger.
    few, rtol = slice(2 if sampling.ranks_as_drawn else None), max(rtol, 1e-4)
    torch.testing.assert_close(found.neg_entropy[few].double(), neg_entropy[few], rtol=rtol, atol=0)
    assert (found.neg_entropy.diff() > 0).all()


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.5, 0.7, 3.0, 40.0])
def test_the_margin_of_two_tokens_keeps_its_digits_whether_they_are_close_or_far(gap: float) -> None:
    logits = torch.full((1, 10), -torch.inf)
    logits[0, [7, 2]] = torch.tensor([0.0, -gap])
    gap = -float(logits[0, 2])
    expected = math.log(-math.expm1(-gap)) - math.log1p(math.exp(-gap)) if gap else -math.inf
    assert float(statistics(logits, query(1, 10)).log_margin) == pytest.approx(expected, rel=1e-6)


def test_what_is_excluded_counts_once_however_often_it_is_listed() -> None:
    """A slot's removed ids are filled up with M."""
    logits = torch.tensor([[0.0, 9.0, -2.0, 5.0, 1.0], [0.0, -2.0, 1.0, 9.0, 5.0]])
    asked = replace(query(2, 5), removed=torch.tensor([[1, -1, -1], [4, 2, -1]]), given=torch.tensor([1, 3]))
    found = statistics(logits.clone(), asked)
    log_p = logits.double().log_softmax(-1)
    assert found.proposal.tolist() == [4, 0]
    torch.testing.assert_close(found.log_top.double(), log_p[[0, 1], [4, 0]], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_given.double(), log_p[[0, 1], [1, 3]], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.neg_entropy.double(), (log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=0)


def test_a_row_with_nothing_to_propose_has_no_probability() -> None:
    logits = torch.full((2, 5), -torch.inf)
    logits[1, MASK] = 2.0
    found = statistics(logits, query(2, 5))
    assert (found.log_top == -torch.inf).all()
    assert (found.log_proposal == -torch.inf).all()
    assert (found.log_margin == -torch.inf).all()
    assert found.neg_entropy.tolist() == [0, 0]


def test_ties_go_to_the_lower_id_and_the_mask_is_never_proposed() -> None:
    logits = torch.zeros(3, 10)
    logits[1, [MASK, 7, 8]] = 5.0
    logits[2] = -torch.inf
    logits[2, [MASK, 9]] = torch.tensor([4.0, 1.0])
    assert statistics(logits, query(3, 10)).proposal.tolist() == [0, 7, 9]
    hot = statistics(logits, query(3, 10, heat=50.0)).proposal
    assert int(hot[2]) == 9


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(1))
    whole = statistics(logits, query(50, 97, heat=0.7))
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 97 * 7)
    found = statistics(logits, query(50, 97, heat=0.7))
    for name in ("ids", "reals"):
        assert torch.equal(getattr(whole, name), getattr(found, name))


def test_a_proposal_is_the_gumbel_maximum_at_its_temperature() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(2))
    asked = query(20, 50, heat=1.3)
    noise = gumbel(asked.keys, torch.arange(50)).double()
    scores = logits.double() / 1.3 + noise
    scores[:, MASK] = -torch.inf
    assert torch.equal(statistics(logits, asked).proposal, scores.argmax(-1))


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.0])
def test_frequencies_match_the_tempered_softmax(heat: float) -> None:
    count, vocab = 40_000, 12
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    asked = query(count, vocab, heat=heat)
    drawn = statistics(row.expand(count, vocab).clone(), asked).proposal
    tempered = row.double() / heat
    tempered[MASK] = -torch.inf
    expected = tempered.softmax(-1) * count
    counts = torch.bincount(drawn, minlength=vocab)
    assert int(counts[MASK]) == 0
    others = [i for i in range(vocab) if i != MASK]
    chi_square = float(((counts[others] - expected[others]) ** 2 / expected[others]).sum())
    assert chi_square < 31.4  # the 99.95th percentile at 10 degrees of freedom


MEASURE = """
import resource, torch
from torch.nn import functional as F
from remask.workers.head import head_statistics
from remask.workers.keyed_random import stream_keys
from remask.workers.rows.pack import HeadQuery
from remask.scheduler.sampling import Sampling
from remask.workers.sampling import SamplingTables
torch.set_num_threads(1)
V, D, N = 126464, 64, {rows}
weight, hidden = torch.randn(V, D, dtype=torch.{dtype}), torch.randn(N, D, dtype=torch.{dtype})
def run(count):
    zeros = torch.zeros(count, dtype=torch.int64)
    query = HeadQuery(zeros, SamplingTables([Sampling({sampling})]), zeros,
        torch.full((count,), {heat}), stream_keys(zeros), frozenset(("margin", "entropy")))
    head_statistics(hidden[:count], lambda x: F.linear(x, weight), V, query, 5)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.linear(hidden[:1], weight).double().softmax(-1)  # libraries are loaded before the count begins
before = peak()
run(N)
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "heat", "sampling"),
    [
        ("float32", 0.0, ""),
        ("bfloat16", 0.0, ""),
        ("float32", 1.0, ""),
        ("float32", 1.0, "temperature=1.0, top_p=0.9, unranked_ids=[1]"),
    ],
)
def test_memory_stays_within_256_megabytes_at_any_batch_size(dtype: str, heat: float, sampling: str) -> None:
    """1,000 rows of 126,464 logits would be 506 MB in fp32."""
    code = MEASURE.format(rows=1000 if heat == 0 else 150, dtype=dtype, heat=heat, sampling=sampling)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 256
