"""The packed transformer against the trainer's independent one, and packing against no packing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from remask.benchmarks.tiny.checkpoint import read_llada
from remask.benchmarks.tiny.model import Shape, TinyTransformer
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows


@pytest.fixture(scope="module")
def reference(golden_checkpoint: Path) -> TinyTransformer:
    model = TinyTransformer(Shape(vocab_size=82), causal=False)
    read_llada(model, golden_checkpoint)
    return model


def pack(sequences: list[Tensor], wanted: list[list[int]] | None = None) -> PackedRows:
    """Sequences one behind the other; every row is a candidate, or only some of each."""
    lens = [len(ids) for ids in sequences]
    cu = tuple(torch.tensor([0, *lens]).cumsum(0).tolist())
    wanted = wanted or [list(range(n)) for n in lens]
    cu_wanted = tuple(torch.tensor([0, *map(len, wanted)]).cumsum(0).tolist())
    candidates = [start + row for start, rows in zip(cu, wanted, strict=False) for row in rows]
    return PackedRows(
        ids_T=torch.cat(sequences),
        positions_T=torch.cat([torch.arange(n) for n in lens]),
        layout=VarlenLayout(cu, cu, ()),
        candidates_H=torch.tensor(candidates),
        candidate_layout=VarlenLayout(cu_wanted, cu, ()),
        slots_N=torch.zeros(len(candidates), dtype=torch.int64),
        num_main_slots=len(candidates),
    )


@torch.inference_mode()
def logits(model: TransformerDenoiser, rows: PackedRows) -> Tensor:
    return model.model.logits(model.model(rows, model.attention))


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(82, (n,), generator=generator) for n in (33, 5, 70, 1)]


def test_logits_equal_an_independent_implementation(
    golden_model: TransformerDenoiser, reference: TinyTransformer
) -> None:
    for ids in sequences():
        with torch.inference_mode():
            expected = reference(ids.unsqueeze(0), len(ids))[0]
        torch.testing.assert_close(logits(golden_model, pack([ids])), expected, rtol=1e-4, atol=1e-4)


def test_a_pack_gives_what_each_sequence_gives_alone(golden_model: TransformerDenoiser) -> None:
    alone = torch.cat([logits(golden_model, pack([ids])) for ids in sequences()])
    torch.testing.assert_close(logits(golden_model, pack(sequences())), alone, rtol=1e-4, atol=1e-4)


def test_candidates_get_what_they_get_among_all_rows(golden_model: TransformerDenoiser) -> None:
    wanted = [[3, 4, 20], [0], [69, 1], [0]]
    every = logits(golden_model, pack(sequences()))
    rows = pack(sequences(), wanted)
    torch.testing.assert_close(logits(golden_model, rows), every[rows.candidates_H], rtol=1e-4, atol=1e-4)


def test_attention_is_bidirectional(golden_model: TransformerDenoiser) -> None:
    ids = sequences()[0]
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 82
    difference = (logits(golden_model, pack([ids])) - logits(golden_model, pack([changed]))).abs()
    assert float(difference[0].max()) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_two_largest_logits_are_not_rounded_until_they_are_equal(
    golden_model: TransformerDenoiser,
) -> None:
    model = copy.deepcopy(golden_model.model).to("cuda", torch.bfloat16)
    assert model.head is not None
    generator = torch.Generator("cuda").manual_seed(0)
    model.head.copy_(torch.randn(model.head.shape, generator=generator, device="cuda"))
    hidden = torch.randn(4000, model.config.hidden_size, generator=generator, device="cuda").bfloat16()
    found = model.logits(hidden)
    exact = model.normed(hidden).double() @ model.head_weight.double().t()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    rounded, kept = (logits.topk(2).values.diff() == 0 for logits in (found.bfloat16(), found))
    assert int(rounded.sum()) > 10
    assert int(kept.sum()) == 0
