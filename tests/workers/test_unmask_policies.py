"""The rules of the unmask policies over random states, against plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import DREAMS, KINDS, UNMASKS, chosen, commits, random_view

from remask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    Schedule,
    Threshold,
)
from remask.workers.keyed_random import stream_keys, uniform_at
from remask.workers.strategies.view import BlockView


def expected_commits(policy: Any, view: BlockView, row: int) -> set[int]:
    """The rules of the papers and reference decoders in plain Python (fp64), one canvas at a time."""
    masked = [j for j, m in enumerate(view.masked[row].tolist()) if m]
    log_c, log_margin = view.log_confidence[row].tolist(), view.log_margin[row].tolist()
    c = [math.exp(x) for x in log_c]
    by_confidence = sorted(masked, key=lambda j: (-log_c[j], j))
    if isinstance(policy, Threshold):
        return {j for j in masked if c[j] >= policy.t} | {by_confidence[0]}
    if isinstance(policy, CappedThreshold):
        cap = min(max(int(0.7 * len(masked)), 5), 20)
        good = [j for j in by_confidence if c[j] > policy.t1]
        return set(good[:cap]) or {by_confidence[0]}
    if isinstance(policy, Schedule):
        scores = {"confidence": log_c, "margin": log_margin, "random": view.order[row].tolist()}
        score = scores.get(policy.score, view.neg_entropy[row].tolist())
        steps_left = (policy.steps or view.masked.shape[1]) - int(view.block_forwards[row])
        count = -(-len(masked) // steps_left) if steps_left > 0 else 1
        return set(sorted(masked, key=lambda j: (-score[j], j))[:count])
    if isinstance(policy, Bernoulli):
        drawn = {j for j in masked if float(view.accept[row, j]) < c[j] ** policy.k}
        return drawn or {by_confidence[0]}
    if isinstance(policy, EntropyBound):
        entropy = (-view.neg_entropy[row]).tolist()
        scores = {"confidence": log_c, "margin": log_margin, "entropy": [-h for h in entropy]}
        by_score = sorted(masked, key=lambda j: (-scores[policy.order][j], j))
        sorted_entropy = [entropy[j] for j in by_score]
        fits = [
            k
            for k in range(1, len(masked) + 1)
            if sum(sorted_entropy[:k]) - max(sorted_entropy[:k]) <= policy.g
        ]
        return set(by_score[: max(fits, default=1)])
    assert isinstance(policy, Factor)
    kept = 0
    for n, j in enumerate(by_confidence, start=1):
        doubt = -math.expm1(log_c[j])
        passes = (n + 1) * doubt < policy.f if policy.strict else c[j] >= 1 - policy.f / (n + 1)
        if n > 1 and not passes:
            break
        kept = n
    if not policy.strict and kept == len(masked) - 1:
        kept = len(masked)
    return set(by_confidence[: max(kept, 1)])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40), kind=KINDS)
@pytest.mark.parametrize("policy", UNMASKS, ids=str)
def test_commits_are_those_of_the_published_rule(policy: Any, seed: int, width: int, kind: str) -> None:
    view = random_view(seed, 6, width, kind)
    commit = commits(policy, view)
    for row in range(6):
        assert set(commit[row].nonzero().squeeze(1).tolist()) == expected_commits(policy, view, row)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40))
@pytest.mark.parametrize("policy", UNMASKS, ids=str)
def test_a_step_commits_at_least_one_masked_slot_and_nothing_else(policy: Any, seed: int, width: int) -> None:
    view = random_view(seed, 6, width)
    commit = commits(policy, view)
    assert commit.any(1).all()
    assert not (commit & ~view.masked).any()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(2, 40))
@pytest.mark.parametrize("policy", UNMASKS, ids=str)
def test_no_canvas_enters_the_decision_about_another(policy: Any, seed: int, width: int) -> None:
    view = random_view(seed, 6, width)
    together = commits(policy, view)
    for row in range(6):
        assert torch.equal(commits(policy, view.select(torch.tensor([row])))[0], together[row])


@pytest.mark.parametrize("kind", [Threshold, CappedThreshold])
@pytest.mark.parametrize(("threshold", "count"), [(0.9, 1), (0.89999998, 4)])
def test_a_threshold_is_not_rounded_to_fp32(kind: Any, threshold: float, count: int) -> None:
    """0.9 in fp32 is 2.4e-8 less than 0.9; the probabilities lie between."""
    log_confidence = torch.full((1, 4), math.log(0.89999999))
    view = random_view(0, 1, 4)._replace(log_confidence=log_confidence, masked=torch.ones(1, 4) > 0)
    assert int(commits(kind(threshold), view).sum()) == count


@pytest.mark.parametrize("num_masked", [1, 2, 3])
def test_the_factor_rule_commits_the_last_one_too_when_only_that_one_fails(num_masked: int) -> None:
    view = random_view(0, 1, 3)
    masked = torch.arange(3).unsqueeze(0) < num_masked
    log_confidence = torch.where(masked, torch.tensor([0.9, 0.1, 0.1]).log(), -torch.inf)
    view = view._replace(masked=masked, log_confidence=log_confidence)
    assert int(commits(Factor(1.0), view).sum()) == (2 if num_masked == 2 else 1)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40), kind=KINDS)
@pytest.mark.parametrize("policy", DREAMS, ids=str)
def test_dream_commits_its_timesteps_share_of_the_masks(
    policy: Dream, seed: int, width: int, kind: str
) -> None:
    view = random_view(seed, 6, width, kind)
    if policy.alg_temp:
        view = view._replace(order=view.order.clamp(0.01, 0.99))
    found, steps = commits(policy, view), policy.steps or width
    for row in range(6):
        masked, k = chosen(view.masked, row), int(view.block_forwards[row])
        slope = (1 - policy.eps) / steps
        share = 1 - (1 - (k + 1) * slope) / (1 - k * slope)
        is_last = k + 1 >= steps
        if policy.alg == "origin":
            assert chosen(found, row) == {j for j in masked if is_last or view.accept[row, j] < share}
            continue
        score = {
            "entropy": view.neg_entropy,
            "maskgit_plus": view.log_confidence,
            "topk_margin": view.log_margin,
        }[policy.alg][row].tolist()
        if policy.alg_temp:
            order = view.order[row].tolist()
            score = score if policy.alg == "entropy" else [math.exp(s) for s in score]
            score = [s / policy.alg_temp - math.log(-math.log(u)) for s, u in zip(score, order, strict=True)]
        count = len(masked) if is_last else math.floor(len(masked) * share)
        assert chosen(found, row) == set(sorted(masked, key=lambda j: (-score[j], j))[:count])


def test_dream_draws_positions_from_the_tempered_softmax() -> None:
    """The first of the positions drawn without replacement has the softmax's frequencies."""
    scores, heat, draws = torch.tensor([0.1, 0.5, 0.9, 0.3]), 0.4, 40_000
    everywhere = torch.ones(draws, 4, dtype=torch.bool)
    uniform = uniform_at(stream_keys(torch.arange(draws).unsqueeze(1), torch.arange(4)))
    view = random_view(0, 1, 4).select(torch.zeros(draws, dtype=torch.int64))
    view = view._replace(
        masked=everywhere,
        log_confidence=scores.log().expand(draws, 4),
        order=uniform,
        block_forwards=torch.zeros(draws, dtype=torch.int64),
    )
    # Four masks, three steps: one position in the first.
    counts = commits(Dream(3, "maskgit_plus", alg_temp=heat), view).sum(0)
    assert int(counts.sum()) == draws
    expected = (scores / heat).softmax(0) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees, p = 0.001
