"""The head against the dense computation, its sampling, and its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from remask.scheduler.sampling import Sampling
from remask.workers import head
from remask.workers.head import Statistics, head_statistics
from remask.workers.keyed_random import gumbel, stream_keys
from remask.workers.rows import HeadQuery
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
        (found.top_prob, top.values[:, 0]),
        (found.proposal_prob, top.values[:, 0]),
        (found.given_prob, p.gather(1, asked.given.unsqueeze(1)).squeeze(1)),
        (found.margin, top.values[:, 0] - top.values[:, 1]),
        (found.neg_entropy, entropy),
    ):
        torch.testing.assert_close(ours.double(), dense, rtol=2e-5, atol=2e-6)


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
    for name in ("proposal", "proposal_prob", "top_prob", "given_prob", "margin", "neg_entropy"):
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
from remask.workers.rows import HeadQuery
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
