"""The fused head against the reference: numbers, ties, draws, and what is left alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from remask.scheduler.sampling import Sampling
from remask.workers.head import Statistics, logits_statistics
from remask.workers.kernels import head as kernel
from remask.workers.kernels.sizes import HeadSizes
from remask.workers.keyed_random import stream_keys
from remask.workers.rows.pack import HeadQuery
from remask.workers.sampling import SamplingTables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then they are about what Triton compiles
MASK, VOCAB, DIM = 3, 300, 40
BOTH = frozenset({"margin", "entropy"})
SENTINEL = -7


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows, several splits of several tiles, and none of them full at the end."""
    use_tiles(monkeypatch, rows=32, merged_rows=4)
    monkeypatch.setattr(kernel, "SPLIT_TILES", 2)


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, merged_rows: int, parts: int = 2) -> None:
    sizes = HeadSizes(rows, 64, 64, parts, num_warps=8, num_stages=3, max_registers=128)
    monkeypatch.setattr(kernel, "head_sizes", lambda is_fp32: sizes)
    monkeypatch.setattr(kernel, "MERGED_ROWS", merged_rows)


def rows(
    count: int, *, vocab: int = VOCAB, scale: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0
):
    """Hidden states and a head, whose logits have a deviation of about six times the scale."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, DIM, generator=generator).to(dtype),
        (torch.randn(vocab, DIM, generator=generator) * scale).to(dtype),
    )


def query(count: int, *, heat: Tensor | float = 0.0, vocab: int = VOCAB, seed: int = 0) -> HeadQuery:
    return HeadQuery(
        owners=torch.zeros(count, dtype=torch.int64),
        sampling=SamplingTables([Sampling()]),
        given=torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)),
        temperature=torch.zeros(count) + heat,
        keys=stream_keys(torch.tensor(seed), torch.arange(count)),
        needs=BOTH,
    )


def dense(normed: Tensor, head: Tensor, asked: HeadQuery, mask_id: int = MASK) -> Statistics:
    logits = (normed.double() @ head.double().T).float()
    return logits_statistics(logits, asked, slice(0, len(normed)), mask_id)


def fused(
    normed: Tensor, head: Tensor, asked: HeadQuery, live: Tensor | None = None, mask_id: int = MASK
) -> Statistics:
    """Statistics of the live rows (all rows if `live` is None). Other rows keep the sentinel."""
    count = len(normed)
    live = torch.arange(count) if live is None else live
    is_live = torch.zeros(count, dtype=torch.bool).index_fill(0, live, True)
    out = Statistics(torch.full((2, count), SENTINEL), torch.full((7, count), float(SENTINEL)))
    out = Statistics(*(x.to(DEVICE) for x in out))
    kernel.fused_statistics(
        normed.to(DEVICE),
        head.to(DEVICE),
        live_N=torch.cat([live, (~is_live).nonzero().squeeze(1)]).int().to(DEVICE),
        count=torch.tensor([len(live)], dtype=torch.int32, device=DEVICE),
        given_N=asked.given.to(DEVICE),
        temperature_N=asked.temperature.to(DEVICE),
        keys_N=asked.keys.to(DEVICE),
        mask_id=mask_id,
        needs=asked.needs,
        out=out,
    )
    return Statistics(*(x.cpu() for x in out))


def assert_equal(found: Statistics, expected: Statistics, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert torch.equal(found.ids, expected.ids)
    # The margin of two tokens that are nearly equally probable is a matter of the product's rounding.
    for own in (found, expected):
        own.log_margin.exp_()
    torch.testing.assert_close(found.reals, expected.reals, rtol=rtol, atol=atol)


def mixed_heat(count: int) -> Tensor:
    return torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(count)[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_statistics_equal_the_references(dtype: torch.dtype, scale: float) -> None:
    normed, head = rows(37, scale=scale, dtype=dtype)
    asked = query(37)
    # On a GPU fp32 sums of another order move logits of 100 by 1e-5.
    strict = scale < 1 if DEVICE == "cuda" else dtype == torch.float32 or products_ignore_places()
    rtol, atol = (1e-5, 2e-6) if strict else (1e-4, 2e-5)
    assert_equal(fused(normed, head, asked), dense(normed, head, asked), rtol, atol)


def test_drawn_tokens_equal_the_references_beside_rows_that_do_not_draw() -> None:
    normed, head = rows(120, scale=0.2)
    asked = query(120, heat=mixed_heat(120))
    found = fused(normed, head, asked)
    assert_equal(found, dense(normed, head, asked))
    assert int((found.proposal != found.top_token).sum()) > 40


def logits_of(table_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that give exactly these finite logits."""
    return torch.eye(len(table_NV)), table_NV.T.contiguous()


def adversarial() -> Tensor:
    table = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(5))
    table[0] = 2.5
    table[1, [MASK, 280, 281]] = torch.tensor([21.0, 20.0, 20.0])
    table[2, 250] = 1e30
    table[3] = torch.where(torch.arange(VOCAB) % 2 == 0, 1e30, -1e30)
    table[4] *= 1e4
    table[5] = -1e30
    table[5, [MASK, 40]] = torch.tensor([1e30, 1e29])
    table[6] = 0
    table[6, MASK] = 200.0
    table[7] = 0
    table[7, [100, 170, 290]] = 30.0
    table[8] = torch.linspace(-1e30, 1e30, VOCAB)
    return table


@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("given", [MASK, 250])
def test_equal_and_huge_logits_give_the_references_numbers(heat: float, given: int) -> None:
    normed, head = logits_of(adversarial())
    asked = replace(query(9, heat=heat), given=torch.full((9,), given))
    found = fused(normed, head, asked)
    assert not found.reals.isnan().any()
    assert_equal(found, dense(normed, head, asked))


def test_ties_go_to_the_lower_id_and_the_mask_is_never_proposed() -> None:
    found = fused(*logits_of(adversarial()), query(9))
    assert found.top_token.tolist()[:4] == [0, 280, 250, 0]
    assert found.top_token.tolist()[6:8] == [0, 100]
    assert found.log_margin[[0, 1, 3, 7]].tolist() == [-torch.inf] * 4
    assert fused(*logits_of(torch.zeros(1, VOCAB)), query(1), mask_id=0).top_token.tolist() == [1]


@pytest.mark.parametrize("place", [5, 290])
@pytest.mark.parametrize("mask_logit", [-torch.inf, -1.0])
def test_probabilities_that_differ_by_less_than_1e_9_have_different_logarithms(
    place: int, mask_logit: float
) -> None:
    table = torch.full((8, VOCAB), -torch.inf)
    table[:, 40::40] = torch.linspace(-4, 0, 7)
    table[:, MASK], table[:, place] = mask_logit, torch.tensor([1.0, 10, 20, 20.5, 21, 30, 36, 60])
    asked = replace(query(8), given=torch.full((8,), place))
    normed, head = torch.eye(8), table.T.nan_to_num(neginf=-200.0).contiguous()
    found, logits = fused(normed, head, asked), head.T.double()
    ratios = (logits - logits[:, [place]]).exp().index_fill(1, torch.tensor(place), 0)
    log_top = -ratios.sum(1).log1p()
    log_margin = log_top + (-ratios.index_fill(1, torch.tensor(MASK), 0).amax(1)).log1p()
    for ours in (found.log_top, found.log_proposal, found.log_given, found.top_logprob):
        torch.testing.assert_close(ours.double(), log_top, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.log_margin.double(), log_margin, rtol=1e-5, atol=0)
    for ours in (found.log_top, found.log_margin, found.neg_entropy):
        assert (ours.diff() > 0).all()


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.5, 0.69, 0.71, 3.0, 40.0])
def test_the_margin_of_two_tokens_keeps_its_digits_whether_they_are_close_or_far(gap: float) -> None:
    table = torch.full((1, VOCAB), -200.0)
    table[0, [7, 270]] = torch.tensor([0.0, -gap])
    gap = -float(table[0, 270])
    expected = math.log(-math.expm1(-gap)) - math.log1p(math.exp(-gap))
    assert float(fused(*logits_of(table), query(1)).log_margin) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_ids_that_are_impossible_have_no_weight(heat: float) -> None:
    normed, head = torch.ones(32, DIM), torch.zeros(VOCAB, DIM)
    asked = replace(query(32, heat=heat), given=torch.full((32,), MASK))
    head[MASK + 1 :] = -torch.inf
    assert_equal(fused(normed, head, asked), dense(normed, head, asked))
    head[[i for i in range(VOCAB) if i != MASK]] = -torch.inf
    found = fused(normed, head, asked)
    assert not found.ids.any()
    none = -torch.inf
    assert found.reals[:, 0].tolist() == [none, none, 0, none, 0, none, none]


@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("mask_id", [0, MASK, VOCAB - 1])
def test_a_row_of_nan_proposes_a_token_of_the_vocabulary(mask_id: int, heat: float) -> None:
    normed, head = rows(5)
    normed[2] = torch.nan
    found = fused(normed, head, query(5, heat=heat), mask_id=mask_id)
    assert ((found.ids >= 0) & (found.ids < VOCAB) & (found.ids != mask_id)).all()
    assert found.reals[:3, 2].isnan().all()
    assert found.reals[:, [0, 1, 3, 4]].isfinite().all()


def test_with_one_token_beside_the_mask_the_margin_is_its_probability() -> None:
    normed, head = rows(5, vocab=2)
    asked = query(5, vocab=2)
    found = fused(normed, head, asked, mask_id=0)
    assert found.top_token.tolist() == [1] * 5
    assert torch.equal(found.log_margin, found.log_top)


def test_a_rows_bits_depend_neither_on_other_rows_nor_on_its_place() -> None:
    normed, head = rows(40, scale=0.3)
    asked = query(40, heat=mixed_heat(40))
    whole = fused(normed, head, asked)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for live in (order, order[:9], torch.tensor([36, 0])):
        part = fused(normed, head, asked, live)
        assert torch.equal(part.ids[:, live], whole.ids[:, live])
        if DEVICE == "cuda" or products_ignore_places():
            assert torch.equal(part.reals[:, live], whole.reals[:, live])
        else:
            torch.testing.assert_close(part.reals[:, live], whole.reals[:, live], rtol=1e-5, atol=1e-6)


def products_ignore_places() -> bool:
    """Whether numpy, which multiplies tiles in the interpreter, gives a row equal products at any place."""
    rng = np.random.default_rng(0)
    tile, other, order = rng.normal(size=(32, 32)), rng.normal(size=(32, 64)), rng.permutation(32)
    tile, other = tile.astype(np.float32), other.astype(np.float32)
    return all(
        np.array_equal((tile[order[:count]] @ other), (tile @ other)[order[:count]]) for count in (32, 9, 2)
    )


@pytest.mark.parametrize("num_live", [0, 32, 37])
def test_rows_that_are_not_live_are_not_written_and_change_nothing(num_live: int) -> None:
    normed, head = rows(70)
    asked = query(70, heat=mixed_heat(70))
    expected = dense(normed, head, asked)
    live = torch.randperm(70, generator=torch.Generator().manual_seed(2))[:num_live]
    dead = torch.ones(70, dtype=torch.bool).index_fill(0, live, False)
    normed[dead] = torch.nan
    asked.temperature[dead] = torch.nan
    found = fused(normed, head, asked, live)
    assert (found.ids[:, dead] == SENTINEL).all()
    assert (found.reals[:, dead] == SENTINEL).all()
    assert_equal(
        Statistics(found.ids[:, live], found.reals[:, live]),
        Statistics(expected.ids[:, live], expected.reals[:, live]),
    )


@pytest.mark.parametrize("split_tiles", [1, 3])
def test_the_number_of_splits_changes_nothing_but_roundings(
    split_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed, head = rows(20)
    asked = query(20, heat=mixed_heat(20))
    expected = fused(normed, head, asked)
    monkeypatch.setattr(kernel, "SPLIT_TILES", split_tiles)
    assert_equal(fused(normed, head, asked), expected)


@pytest.mark.parametrize("parts", [1, 4, 8])
def test_the_parts_that_a_tile_is_cut_into_change_nothing_but_roundings(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed, head = rows(20)
    asked = query(20, heat=mixed_heat(20))
    expected = fused(normed, head, asked)
    use_tiles(monkeypatch, rows=32, merged_rows=4, parts=parts)
    assert_equal(fused(normed, head, asked), expected)


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"margin"}), frozenset({"entropy"})])
def test_what_nobody_reads_is_0(needs: frozenset[str]) -> None:
    normed, head = rows(20)
    asked = replace(query(20), needs=needs)
    assert_equal(fused(normed, head, asked), dense(normed, head, asked))


def test_views_are_read_and_written_where_they_lie() -> None:
    normed, head = rows(20)
    wide = torch.full((20, DIM + 8), torch.nan)
    wide[:, :DIM] = normed
    wide_head = torch.full((VOCAB, DIM + 24), torch.nan)
    wide_head[:, :DIM] = head
    asked, wider = query(20), Statistics.blank(33, torch.device(DEVICE))
    kernel.fused_statistics(
        wide.to(DEVICE)[:, :DIM],
        wide_head.to(DEVICE)[:, :DIM],
        live_N=torch.arange(20, dtype=torch.int32, device=DEVICE),
        count=torch.tensor([20], dtype=torch.int32, device=DEVICE),
        given_N=asked.given.to(DEVICE),
        temperature_N=asked.temperature.to(DEVICE),
        keys_N=asked.keys.to(DEVICE),
        mask_id=MASK,
        needs=BOTH,
        out=wider.part(slice(5, 25)),
    )
    expected = fused(normed, head, asked)
    assert torch.equal(wider.reals[:, 5:25].cpu(), expected.reals)
    assert not wider.ids[:, [*range(5), *range(25, 33)]].any()


@pytest.mark.parametrize("heat", [0.5, 2.0])
def test_frequencies_match_the_tempered_softmax(heat: float, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = 1024 if DEVICE == "cpu" else 16
    use_tiles(monkeypatch, num_rows, merged_rows=num_rows)
    count, vocab = 10_000, 12
    head = torch.randn(vocab, 1, generator=torch.Generator().manual_seed(3))
    drawn = fused(torch.ones(count, 1), head, query(count, heat=heat, vocab=vocab)).proposal
    tempered = head[:, 0].double() / heat
    tempered[MASK] = -torch.inf
    expected = tempered.softmax(-1) * count
    counts = torch.bincount(drawn, minlength=vocab)
    assert int(counts[MASK]) == 0
    others = [i for i in range(vocab) if i != MASK]
    chi_square = float(((counts[others] - expected[others]) ** 2 / expected[others]).sum())
    assert chi_square < 31.4  # the 99.95th percentile at 10 degrees of freedom


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_tiles_give_the_references_numbers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    normed, head = rows(300, vocab=5003, dtype=dtype)
    asked = query(300, heat=mixed_heat(300), vocab=5003)
    assert_equal(fused(normed, head, asked), dense(normed, head, asked), rtol=1e-4, atol=1e-5)
