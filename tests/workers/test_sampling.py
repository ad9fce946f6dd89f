"""Sampling parameters: edits, filters and guidance against plain computations, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remask import SamplingParams, Schedule
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.scheduler.sampling import Sampling, bias_bytes, id_bytes
from remask.workers.head import Statistics, head_statistics
from remask.workers.keyed_random import stream_keys
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import HeadQuery
from remask.workers.sampling import SamplingTables
from remask.workers.tensors import tensors_of
from remask.workers.worker import Worker

CPU = torch.device("cpu")
MASK, VOCAB = 3, 12
OTHER = Sampling(
    temperature=0.5,
    top_k=2,
    banned_ids=id_bytes([1, 4]),
    logit_bias=bias_bytes({2: 5.0}),
    unranked_ids=[7],
)


def answer(
    logits: Tensor,
    samplings: list[Sampling],
    owners: list[int],
    seed: int = 0,
    removed: list[list[int]] | None = None,
) -> Statistics:
    """Statistics of rows [N, V] of several canvases."""
    tables = SamplingTables(samplings)
    rows = torch.tensor(owners)
    query = HeadQuery(
        owners=rows,
        sampling=tables,
        given=torch.arange(len(rows)) % VOCAB,
        temperature=tables.temperature[rows],
        keys=stream_keys(torch.arange(len(rows)) + seed * len(rows)),
        needs=frozenset({"margin", "entropy"}),
        removed=torch.tensor(removed) if removed is not None else None,
    )
    return head_statistics(logits, torch.clone, VOCAB, query, MASK)


def row_of(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def expected_probabilities(logits: Tensor, sampling: Sampling) -> list[float]:
    """What each token is drawn with, filter after filter, in plain Python."""
    p = (logits.double() / sampling.temperature).tolist()
    order = sorted((i for i in range(VOCAB) if i != MASK), key=lambda i: (-p[i], i))
    weights = {i: math.exp(p[i] - p[order[0]]) for i in order}
    kept = order[: sampling.top_k] if sampling.top_k else order
    kept = [i for i in kept if weights[i] >= sampling.min_p]
    total, share, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        share += weights[i] / total
        if share >= sampling.top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(VOCAB)]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_tokens_are_drawn_from_the_filtered_softmax(fields: dict[str, Any], temperature: float) -> None:
    sampling, count = Sampling(temperature=temperature, **fields), 20_000
    expected = np.array(expected_probabilities(row_of(1), sampling))
    both = row_of(1).expand(2 * count, VOCAB).clone()
    drawn = answer(both, [sampling, OTHER], [0] * count + [1] * count).proposal[:count]
    found = np.bincount(drawn.numpy(), minlength=VOCAB)
    assert (found[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((found - expected * count)[likely] ** 2 / (expected * count)[likely]).sum()
    assert chi_square < 35, "10 degrees of freedom: the 99.98th percentile"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_row_is_changed_by_its_own_parameters_alone(seed: int) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(seed))
    kinds = [
        Sampling(),
        OTHER,
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(allowed_ids=id_bytes([2, 5]), temperature=2.0),
        Sampling(logit_bias=bias_bytes({0: -9.0, 11: 3.0})),
        Sampling(banned_ids=id_bytes([0, 1, 2, 4, 5, 6]), temperature=1.0),
    ]
    together = answer(logits.clone(), kinds, list(range(6)))
    for row, kind in enumerate(kinds):
        tables = SamplingTables([kind])
        alone = head_statistics(
            logits[row : row + 1],
            torch.clone,
            VOCAB,
            HeadQuery(
                owners=torch.tensor([0]),
                sampling=tables,
                given=torch.tensor([row]),
                temperature=tables.temperature,
                keys=stream_keys(torch.tensor([row])),
                needs=frozenset({"margin", "entropy"}),
            ),
            MASK,
        )
        for name in ("proposal", "log_proposal", "log_top", "log_given", "log_margin", "neg_entropy"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), (row, name)


def test_edits_come_before_the_softmax() -> None:
    logits = row_of(2)
    sampling = Sampling(logit_bias=bias_bytes({0: 2.0, 5: -1.0}), banned_ids=id_bytes([8]))
    edited = logits.double()
    edited[0] += 2
    edited[5] -= 1
    edited[8] = -torch.inf
    p = edited.softmax(-1)
    found = answer(logits.expand(VOCAB, VOCAB).clone(), [sampling], [0] * VOCAB)
    torch.testing.assert_close(found.log_given.exp().double(), p, rtol=1e-5, atol=1e-7)
    p[MASK] = -1
    assert found.proposal.tolist() == [int(p.argmax())] * VOCAB


id_lists = st.sets(st.integers(0, VOCAB - 1), max_size=VOCAB)


@settings(deadline=None, max_examples=100)
@given(
    lists=st.lists(
        st.tuples(id_lists, id_lists, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9, width=32))),
        min_size=1,
        max_size=6,
    ),
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    seed=st.integers(0, 999),
)
def test_each_row_is_edited_by_the_lists_of_its_canvas(
    lists: list[tuple[set[int], set[int], dict[int, float]]], owners: list[int], seed: int
) -> None:
    owners = [owner % len(lists) for owner in owners]
    logits = torch.randn(len(owners), VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = logits.clone()
    for row, owner in zip(expected, owners, strict=True):
        allowed, banned, bias = lists[owner]
        for token in range(VOCAB):
            row[token] += bias.get(token, 0.0)
            if token in banned or (allowed and token not in allowed):
                row[token] = -torch.inf
    tables = SamplingTables(
        [
            Sampling(allowed_ids=id_bytes(allowed), banned_ids=id_bytes(banned), logit_bias=bias_bytes(bias))
            for allowed, banned, bias in lists
        ]
    )
    tables.edit(logits, torch.tensor(owners))
    assert torch.equal(logits, expected)


def test_tables_are_as_long_as_the_lists_of_all_canvases() -> None:
    def num_bytes(samplings: list[Sampling]) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(SamplingTables(samplings)))

    long = {"allowed_ids": id_bytes(range(9000)), "banned_ids": id_bytes(range(1, 9000))}
    biased = [Sampling(logit_bias=bias_bytes({i: 1.0})) for i in range(99)]
    alone, others = num_bytes([Sampling(**long)]), num_bytes(biased)
    assert num_bytes([*biased, Sampling(**long)]) <= alone + others
    assert num_bytes([Sampling(**long)] * 100) < alone + num_bytes([Sampling()] * 100) + 100 * 8
    assert SamplingTables([Sampling()]).edits is None, "and there is no table if no canvas has a list"


def test_only_allowed_ids_are_proposed() -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(allowed_ids=id_bytes([9, 1, MASK]), temperature=3.0)
    found = answer(logits.clone(), [sampling, Sampling(temperature=3.0)], [0, 1] * 100)
    assert set(found.proposal[::2].tolist()) == {1, 9}
    assert len(set(found.proposal[1::2].tolist())) == VOCAB - 1
    limited = logits[::2][:, [1, MASK, 9]].double().softmax(-1)
    place = (found.proposal[::2] == 9).long() * 2
    torch.testing.assert_close(
        found.log_proposal[::2].exp().double(),
        limited.gather(1, place.unsqueeze(1)).squeeze(1),
        rtol=1e-5,
        atol=1e-7,
    )


def test_an_end_that_is_proposed_ranks_last_and_the_others_are_renormalised() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, 7] = 5.0  # proposes the unranked one
    logits[1, 7], logits[1, 2] = 2.0, 4.0
    logits[2, 2] = 1.0
    found = answer(logits.clone(), [Sampling(unranked_ids=[7, 8]), Sampling()], [0, 0, 1])
    assert found.proposal.tolist() == [7, 2, 2]
    ranked = logits.double()
    ranked[:, [7, 8]] = -torch.inf
    p = ranked.softmax(-1)
    assert float(found.log_proposal[0].exp()) == 0
    assert float(found.log_proposal[1].exp()) == pytest.approx(float(p[1, 2]), rel=1e-5)
    assert float(found.log_top[0].exp()) == pytest.approx(float(p[0, 0]), rel=1e-5)
    assert float(found.log_margin[1].exp()) == pytest.approx(float(p[1, 2] - p[1, 0]), rel=1e-4)
    assert float(found.neg_entropy[1]) == pytest.approx(-float(torch.special.entr(p[1]).sum()), rel=1e-4)
    plain = logits[1].double().softmax(-1)
    assert float(found.log_given[1].exp()) == pytest.approx(float(plain[1]), rel=1e-5), (
        "ranking alone changes"
    )
    assert float(found.log_proposal[2].exp()) == pytest.approx(
        float(logits[2].double().softmax(-1)[2]), rel=1e-5
    )


def test_what_was_removed_is_not_proposed_and_keeps_its_probability() -> None:
    logits = torch.stack([row_of(11), row_of(11), row_of(12), row_of(11)])
    first, second, third = row_of(11).masked_fill(torch.arange(VOCAB) == MASK, -9).topk(3).indices.tolist()
    removed = [[-1, -1], [first, -1], [2, 5], [second, first]]
    found = answer(logits.clone(), [Sampling()], [0] * 4, removed=removed)
    p = row_of(11).double().softmax(-1)
    assert found.proposal.tolist()[:2] == [first, second]
    assert found.proposal.tolist()[3] == third
    for row, token in ((0, first), (1, second), (3, third)):
        assert float(found.log_proposal[row].exp()) == pytest.approx(float(p[token]), rel=1e-5)
        assert float(found.log_top[row].exp()) == float(found.log_proposal[row].exp())
        assert float(found.proposal_logprob[row]) == pytest.approx(float(p[token].log()), rel=1e-5)
    assert float(found.log_margin[1].exp()) == pytest.approx(float(p[second] - p[third]), rel=1e-4)
    draws = 500
    many = row_of(11).expand(draws, VOCAB).clone()
    hot = answer(many, [Sampling(temperature=2.0)], [0] * draws, removed=[[first, -1]] * draws)
    assert first not in hot.proposal.tolist()


@pytest.mark.parametrize("width", [5, 6, 9, 17])
def test_a_neighbour_with_more_removed_tokens_changes_no_bit(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, VOCAB, generator=generator) * 3
    removed = [[0, 1, 2, 4] + [-1] * (width - 4)] * 200
    alone = answer(logits.clone(), [Sampling()], [0] * 200, removed=[[0, 1, 2, 4]] * 200)
    beside = answer(logits.clone(), [Sampling()], [0] * 200, removed=removed)
    assert torch.equal(alone.ids, beside.ids)
    assert torch.equal(alone.reals, beside.reals)


def test_removed_tokens_may_be_proposed_if_no_other_token_may() -> None:
    sampling = Sampling(allowed_ids=id_bytes([1, 2, MASK]))
    logits = torch.stack([row_of(13)] * 2)
    found = answer(logits, [sampling], [0, 0], removed=[[1, -1], [1, 2]])
    assert found.proposal.tolist() == [2, int(row_of(13)[[1, 2]].argmax()) + 1]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    top_k=st.integers(0, 4),
    top_p=st.sampled_from([1.0, 0.7, 0.2]),
    min_p=st.sampled_from([0.0, 0.3]),
    unranked=st.lists(st.integers(4, VOCAB - 1), max_size=2),
)
def test_a_policy_that_ranks_as_drawn_sees_the_tempered_and_filtered_softmax(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, unranked: list[int]
) -> None:
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        ranks_as_drawn=True,
        unranked_ids=unranked,
    )
    raw = row_of(seed)
    found = answer(torch.stack([raw, raw]), [sampling, Sampling()], [0, 1])
    heat = temperature or 1.0
    filters = Sampling(temperature=heat, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = torch.tensor(expected_probabilities(raw, filters), dtype=torch.float64)
    if top_k == 0 and top_p == 1 and min_p == 0:
        drawn = (raw.double() / heat).softmax(-1)  # M belongs to the softmax where nothing is left out
    drawn[unranked] = 0
    drawn = drawn / drawn.sum().clamp(min=1e-30)
    proposal = int(found.proposal[0])
    assert float(found.log_proposal[0].exp()) == pytest.approx(float(drawn[proposal]), rel=1e-4, abs=1e-7)
    proposable = drawn.clone()
    proposable[MASK] = 0
    best = proposable.topk(2).values
    assert float(found.log_top[0].exp()) == pytest.approx(float(best[0]), rel=1e-4, abs=1e-7)
    assert float(found.log_margin[0].exp()) == pytest.approx(float(best[0] - best[1]), rel=1e-3, abs=1e-6)
    entropy = float((drawn * (drawn + 1e-10).log()).sum())
    if float(drawn.sum()) > 0:
        assert float(found.neg_entropy[0]) == pytest.approx(entropy, rel=1e-3, abs=1e-5)
    whole = raw.double().log_softmax(-1)
    assert float(found.proposal_logprob[0]) == pytest.approx(float(whole[proposal]), rel=1e-4)
    plain = answer(raw.unsqueeze(0), [Sampling()], [0])
    for name in ("proposal", "log_proposal", "log_top", "log_margin", "neg_entropy", "proposal_logprob"):
        assert torch.equal(getattr(plain, name)[0], getattr(found, name)[1])


def canvas(prompt: list[int], **fields: Any) -> Canvas:
    params = SamplingParams(max_tokens=12, block_length=6, unmask=Schedule(), **fields)
    return new_canvas("r", 0, prompt, resolve(params), seed=5, sample=0, mask_id=0, stop_ids=[])


@torch.inference_mode()
def dense_guided(model: TransformerDenoiser, prompt: list[int], w: float) -> list[int]:
    """One token a step, in two whole forwards each, as the published code decodes with guidance."""
    from remask.workers.attention.varlen import VarlenLayout
    from remask.workers.rows.pack import PackedRows

    def logits(ids: Tensor) -> Tensor:
        bounds = (0, len(ids))
        every = torch.arange(len(ids))
        layout = VarlenLayout(bounds, bounds, ())
        rows = PackedRows(ids, every, layout, every, layout, every, len(ids))
        return model.model.logits(model.model(rows, model.attention)).float()

    ids, start = torch.tensor(prompt + [0] * 12), len(prompt)
    for block in (0, 6):
        for _ in range(6):
            hidden = ids.clone()
            hidden[:start] = 0
            guided = logits(hidden)
            guided = guided + (w + 1) * (logits(ids) - guided)
            p = guided.softmax(-1)
            guided[:, 0] = -torch.inf
            proposal = guided.argmax(-1)
            c = p.gather(1, proposal.unsqueeze(1)).squeeze(1)
            c[ids != 0] = -torch.inf
            c[: start + block] = c[start + block + 6 :] = -torch.inf
            best = int(c.argmax())
            ids[best] = proposal[best]
    return ids.tolist()


def test_guidance_weighs_the_prompt_in_any_company(golden_model: TransformerDenoiser) -> None:
    prompts = ([33, 11, 12, 14], [20, 7, 7], [33, 11, 12, 14])
    canvases = [
        canvas(prompts[0], cfg_scale=0.5),
        canvas(prompts[1], remask="wino:0.9"),
        canvas(prompts[1], cfg_scale=2.0),
        canvas(prompts[2]),
    ]
    assert [own.num_rows for own in canvases] == [32, 15 + 6, 30, 16]
    batch = StepBatch(
        burst_id=0, num_steps=100, specs=[c.spec for c in canvases], states=[c.state for c in canvases]
    )
    found = Worker(golden_model).run(batch)
    tokens = [state.token_array().tolist() for state in found.states]
    assert tokens[0] == dense_guided(golden_model, prompts[0], 0.5)
    assert tokens[2] == dense_guided(golden_model, prompts[1], 2.0)
    assert tokens[0] != tokens[3], "guidance makes a difference"
    assert all(state.num_forwards == 12 for state in found.states)
    for own, state in zip(canvases, found.states, strict=True):
        alone = StepBatch(burst_id=0, num_steps=100, specs=[own.spec], states=[own.state])
        assert Worker(golden_model).run(alone).states[0].tokens == state.tokens
