"""Filters against their definition: the beginning of the whole row, sorted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remask.scheduler.sampling import Sampling
from remask.workers import filters
from remask.workers.filters import reach_of
from remask.workers.sampling import SamplingTables

VOCAB = 96
OFF = Sampling(temperature=1.0, top_p=1 - 2**-24)


def sorted_whole(logits_NV: Tensor, samplings: list[Sampling]) -> Tensor:
    """Which tokens may not be drawn, by sorting all of them."""
    ordered, ids = logits_NV.sort(dim=-1, descending=True, stable=True)
    heat, top_p, min_p = (
        torch.tensor([[getattr(s, name)] for s in samplings]) for name in ("temperature", "top_p", "min_p")
    )
    top_k = torch.tensor([[s.top_k] for s in samplings])
    weight = ((ordered - ordered[:, :1]) / heat).double().exp()
    place = torch.arange(logits_NV.shape[1])
    weight = torch.where(((place < top_k) | (top_k == 0)) & (weight >= min_p), weight, 0.0)
    before = weight.cumsum(-1) - weight
    # Without a limit on the share, rounding must not leave out what weighs less than a sum's last bit.
    is_early = (before < top_p * weight.sum(-1, keepdim=True)) | (top_p == 1) | (place == 0)
    return torch.empty_like(weight > 0).scatter_(1, ids, ~((weight > 0) & is_early))


def found(logits_NV: Tensor, samplings: list[Sampling], *, static_shapes: bool) -> Tensor:
    tables = SamplingTables(samplings)
    return tables.improbable(logits_NV, torch.arange(len(samplings)), static_shapes=static_shapes)


def adversarial(kind: str, generator: torch.Generator) -> Tensor:
    """A row that is hard to cut at the right place."""
    noise = torch.randn(VOCAB, generator=generator)
    return {
        "plain": noise * 3,
        "peaked": torch.cat([noise[:1] + 20, noise[1:]]),
        "flat": torch.full((VOCAB,), 2.5),
        "nearly flat": 1 + noise * 1e-7,
        "ties": noise.round(),
        "zeros of both signs": torch.where(noise > 0, 0.0, -0.0),
        "impossible": torch.where(noise > 0.8, noise, -torch.inf),
        "one": torch.where(torch.arange(VOCAB) == 40, 0.0, -torch.inf),
        "none": torch.full((VOCAB,), -torch.inf),
        "huge": noise * 1e30,
        "far": torch.linspace(-800, 0, VOCAB),
        "nan": torch.where(torch.arange(VOCAB) == 7, torch.nan, noise),
    }[kind]


KINDS = [
    "plain", "peaked", "flat", "nearly flat", "ties", "zeros of both signs", "impossible", "one", "none",
    "huge", "far", "nan",
]  # fmt: skip
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.01, 0.7, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 2, 17, VOCAB - 1, VOCAB, 10 * VOCAB]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.25, 0.5, 0.9, 0.999, 1 - 2**-24]),
    min_p=st.sampled_from([0.0, 0.0, 1e-12, 0.01, 0.3, 1.0]),
)


@pytest.mark.parametrize("num_candidates", [4, 1024])
@pytest.mark.parametrize("static_shapes", [False, True])
@settings(deadline=None, max_examples=120)
@given(
    own=st.lists(st.tuples(st.sampled_from(KINDS), samplings), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_the_tokens_kept_are_the_beginning_of_the_sorted_row(
    static_shapes: bool, num_candidates: int, own: list[tuple[str, Sampling]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Only rows that filter are asked about.
    asked = [sampling if sampling.filters else OFF for _, sampling in own]
    logits = torch.stack([adversarial(kind, generator) for kind, _ in own])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "NUM_CANDIDATES", num_candidates)
        assert torch.equal(found(logits, asked, static_shapes=static_shapes), sorted_whole(logits, asked))


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_of_a_large_vocabulary_the_same_tokens_are_kept(scale: float, static_shapes: bool) -> None:
    """Also where the limit on the share is far beyond the candidates."""
    logits = torch.randn(4, 20_011, generator=torch.Generator().manual_seed(3)) * scale
    own = [
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=0.8, top_p=0.1, min_p=1e-3),
        Sampling(temperature=1.0, top_k=50, top_p=0.5),
        Sampling(temperature=1.3, min_p=0.02),
    ]
    assert torch.equal(found(logits, own, static_shapes=static_shapes), sorted_whole(logits, own))


@pytest.mark.parametrize("min_p", [0.0, 1e-300, 1e-12, 0.05, 0.3, 1 - 2**-24, 1.0])
def test_the_reach_is_the_last_number_whose_weight_is_large_enough(min_p: float) -> None:
    reach = torch.tensor(reach_of(min_p))
    assert math.exp(-float(reach)) >= max(min_p, 5e-324)
    beyond = math.exp(-float(torch.nextafter(reach, torch.tensor(torch.inf))))
    assert beyond < min_p or beyond == 0


class Unsorted(TorchDispatchMode):
    """Refuses to sort."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "sort" not in func.name(), func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fields", "static_shapes"),
    [
        ({"min_p": 0.1}, False),
        ({"min_p": 0.1}, True),
        ({"top_k": 20}, False),
        ({"top_k": 20}, True),
        ({"top_k": 20, "top_p": 0.9}, True),
        ({"top_p": 0.9}, False),
    ],
    ids=str,
)
def test_no_filter_but_a_share_in_static_shapes_sorts_the_vocabulary(
    fields: dict[str, Any], static_shapes: bool
) -> None:
    logits = torch.randn(2, 2 * filters.NUM_CANDIDATES, generator=torch.Generator().manual_seed(0))
    with Unsorted():
        found(logits, [Sampling(temperature=1.0, **fields)] * 2, static_shapes=static_shapes)
