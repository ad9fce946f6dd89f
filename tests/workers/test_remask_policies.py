"""The rules of the remask policies over random states, against plain Python."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import KINDS, chosen, commits, decide, group_of, random_view

from remask import (
    CappedThreshold,
    LowProb,
    RandomRemask,
    Rcr,
    Remdm,
    Saber,
    Schedule,
    Threshold,
    Wino,
)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    t2=st.floats(0, 1),
    budget=st.sampled_from(["prev_accept", "cur_accept"]),
    kind=KINDS,
)
def test_wino_remasks_the_least_probable_within_its_budget(
    seed: int, width: int, t2: float, budget: Any, kind: str
) -> None:
    view, policy = random_view(seed, 6, width, kind), Wino(t2, budget=budget)
    commit = commits(CappedThreshold(0.5), view)
    group = group_of(policy, 6, width)
    previous = torch.randint(1, 31, (6,), generator=torch.Generator().manual_seed(seed)).float()
    params = group.params_at(torch.zeros(6, dtype=torch.int64))
    kept, remask, memory, *_ = group.kernel(view, commit, params, {"prev_accept": previous})
    assert torch.equal(kept, commit)
    assert torch.equal(memory["prev_accept"], commit.sum(1).float())
    for row in range(6):
        log_r = view.log_verified[row].tolist()
        num_commits = int(commit[row].sum())
        limit = int(previous[row]) if budget == "prev_accept" else num_commits
        doubtful = [j for j in range(width) if view.committed[row, j] and math.exp(log_r[j]) < t2]
        if num_commits <= 1:
            doubtful = []
        elif len(doubtful) >= limit:
            doubtful = sorted(doubtful, key=lambda j: (log_r[j], j))[: limit - 1]
        assert set(remask[row].nonzero().squeeze(1).tolist()) == set(doubtful)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    t=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    max_times=st.integers(0, 2),
    max_share=st.sampled_from([0.0, 0.25, 1.0]),
    post_steps=st.integers(0, 2),
    kind=KINDS,
)
def test_low_prob_remasks_the_lowest_within_its_share_and_times(
    seed: int, width: int, t: float, max_times: int, max_share: float, post_steps: int, kind: str
) -> None:
    view = random_view(seed, 6, width, kind)
    full = torch.arange(6) % 3 == 0  # blocks in which nothing is masked any more
    view = view._replace(masked=view.masked & ~full.unsqueeze(1))
    view = view._replace(log_confidence=torch.where(view.masked, view.log_confidence, -torch.inf))
    times = torch.randint(3, (6, width), generator=torch.Generator().manual_seed(seed)).float()
    policy = LowProb(t, max_times, max_share, post_steps)
    commit = commits(Threshold(0.5), view)
    found = decide(policy, view, commit, {"times": times, "posts": torch.ones(6)})
    assert torch.equal(found.commit, commit)
    for row in range(6):
        log_p, committed = view.log_visible[row].tolist(), chosen(view.committed, row)
        doubtful = [j for j in committed if math.exp(log_p[j]) < t and times[row, j] < max_times]
        limit = max(1, int(max_share * len(committed)))
        expected = set(sorted(doubtful, key=lambda j: (log_p[j], j))[:limit])
        assert chosen(found.remask, row) == expected
        for j in range(width):
            assert found.memory["times"][row, j] == times[row, j] + (j in expected)
        was_full, left = not view.masked[row].any(), chosen(view.masked & ~commit, row) | expected
        assert found.memory["posts"][row] == 1 + was_full
        # A block goes on after its last mask, and as long as the forwards after it found something to remask.
        assert bool(found.holds[row]) == (not left and not was_full and post_steps > 1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    n=st.integers(1, 5),
    mu=st.integers(1, 9),
    kind=KINDS,
)
def test_saber_commits_above_its_mean_and_takes_back_the_largest_drops(
    seed: int, width: int, n: int, mu: int, kind: str
) -> None:
    view, other = random_view(seed, 6, width, kind), random_view(seed + 1, 6, width, kind)
    fresh = torch.arange(6) % 3 == 0  # nothing was ever committed there
    ever = (other.accept < 0.5) & ~fresh.unsqueeze(1)
    memory = {"ever": ever.float(), "log_confidence": other.log_visible, "log_top": other.log_top}
    found = decide(Saber(n, mu), view, torch.zeros_like(view.masked), memory)
    for row in range(6):
        masked, log_c = chosen(view.masked, row), view.log_confidence[row].tolist()
        past = [Fraction(math.exp(memory["log_confidence"][row, j])) for j in chosen(ever, row)]
        bar = sum(past) / len(past) if past else 1
        accepted = {j for j in masked if Fraction(math.exp(log_c[j])) > bar}
        if len(accepted) < n:
            accepted = set(sorted(masked, key=lambda j: (-log_c[j], j))[:n])
        k = min(max(n // 2, -(-len(accepted) // mu)), len(accepted) - 1) if masked - accepted else 0
        now, before = view.log_top[row].tolist(), memory["log_top"][row].tolist()
        drop = [math.exp(b) - math.exp(a) for a, b in zip(now, before, strict=True)]
        back = set(sorted(chosen(view.committed, row) | accepted, key=lambda j: (-drop[j], j))[:k])
        assert chosen(found.commit, row) == accepted - back
        assert chosen(found.remask, row) == back - accepted
        assert chosen(found.memory["ever"] > 0, row) == chosen(ever, row) | accepted
        for j in accepted:
            assert found.memory["log_confidence"][row, j] == view.log_confidence[row, j]
    assert torch.equal(found.memory["log_top"], view.log_top)


@pytest.mark.parametrize("kept", [1e-9, 0.3])
def test_saber_takes_no_confidence_for_larger_than_the_mean_of_its_equals(kept: float) -> None:
    log_p = torch.full((1, 7), math.log1p(-kept))
    view = random_view(0, 1, 7)._replace(
        masked=torch.arange(7).unsqueeze(0) >= 3,
        committed=torch.arange(7).unsqueeze(0) < 3,
        log_confidence=log_p,
    )
    memory = {"ever": view.committed.float(), "log_confidence": log_p, "log_top": view.log_top}
    found = decide(Saber(n=1, mu=9), view, torch.zeros_like(view.masked), memory)
    assert chosen(found.memory["ever"] > 0, 0) == {0, 1, 2, 3}, "the best one alone"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40))
@pytest.mark.parametrize("like", [Wino(0.6, budget="cur_accept"), LowProb(0.6, max_times=2)])
def test_random_remasks_as_many_as_its_model_from_the_same_candidates(
    like: Any, seed: int, width: int
) -> None:
    view = random_view(seed, 6, width)
    fields = {name: getattr(like, name) for name in like.__struct_fields__ if name != "tile"}
    policy = RandomRemask(like.__struct_config__.tag, **fields)
    commit = commits(CappedThreshold(0.5), view)
    memory = group_of(policy, 6, width).initial_memory(width)
    if isinstance(like, LowProb):
        memory["times"] += torch.randint(3, (6, width), generator=torch.Generator().manual_seed(seed))
    model = decide(
        like, view, commit, {name: memory[name] for name in group_of(like, 6, width).initial_memory(1)}
    )
    found = decide(policy, view, commit, memory)
    assert torch.equal(found.commit, commit)
    for row in range(6):
        candidates = chosen(view.committed, row)
        if isinstance(like, LowProb):
            candidates = {j for j in candidates if memory["times"][row, j] < like.max_times}
        count = len(chosen(model.remask, row))
        draw = view.remask_draw[row].tolist()
        assert chosen(found.remask, row) == set(sorted(candidates, key=lambda j: (-draw[j], j))[:count])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    steps=st.integers(1, 50),
    conf=st.sampled_from(["prob", "margin", "entropy"]),
    kind=KINDS,
)
def test_rcr_leaves_the_lowest_stored_masked(seed: int, width: int, steps: int, conf: Any, kind: str) -> None:
    view, beside = random_view(seed, 6, width, kind), Schedule(steps)
    stored = random_view(seed + 1, 6, width, kind).log_visible
    commit = commits(beside, view)
    found = decide(Rcr(conf), view, commit, {"stored": stored}, beside)
    numbers = {"prob": view.log_confidence, "margin": view.log_margin, "entropy": view.neg_entropy}[conf]
    for row in range(6):
        masked, committed = chosen(view.masked, row), chosen(view.committed, row)
        now = [float(numbers[row, j] if j in masked else stored[row, j]) for j in range(width)]
        m0, k = len(masked | committed), int(view.block_forwards[row]) + 1
        left = math.floor(Fraction(m0) * (1 - Fraction(k, steps))) if k < steps else 0
        lowest = set(sorted(masked | committed, key=lambda j: (now[j], j))[:left])
        assert chosen(found.commit, row) == masked - lowest
        assert chosen(found.remask, row) == committed & lowest
        for j in masked | committed:
            assert float(found.memory["stored"][row, j]) == now[j]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    policy=st.sampled_from(
        [Remdm(9), Remdm(4, "cap", 0.4), Remdm(5, "rescale"), Remdm(6, "rescale", 0.7), Remdm(7, "conf")]
    ),
)
def test_remdm_commits_and_remasks_with_the_probabilities_of_its_schedule(
    seed: int, width: int, policy: Remdm
) -> None:
    view = random_view(seed, 6, width)
    stored = random_view(seed + 1, 6, width).log_visible
    found = decide(policy, view, torch.zeros_like(view.masked), {"stored": stored})
    assert found.takes_top is not None
    for row in range(6):
        masked, committed, k = (
            chosen(view.masked, row),
            chosen(view.committed, row),
            int(view.block_forwards[row]),
        )
        steps = policy.steps
        assert steps is not None
        assert bool(found.takes_top[row]) == (k >= steps)
        if k >= steps:
            assert chosen(found.commit, row) == masked
            assert chosen(found.remask, row) == set()
            continue
        times = np.linspace(1, 1e-5, steps + 1)
        alpha_t, alpha_s = 1 - times[k], 1 - times[k + 1]
        largest = min(1, (1 - alpha_s) / alpha_t) if alpha_t else 1
        p_stay = 0.0
        if policy.schedule == "conf":
            weights = {j: math.exp(-math.exp(stored[row, j])) for j in committed}
            back = {j: largest * w / sum(weights.values()) for j, w in weights.items()}
        else:
            eta = policy.eta or {"cap": 0.008, "rescale": 0.015}[policy.schedule]
            p_stay = min(eta, largest) if policy.schedule == "cap" else eta * largest
            back = dict.fromkeys(committed, p_stay)
        p_commit = (alpha_s - (1 - p_stay) * alpha_t) / (1 - alpha_t)
        assert chosen(found.commit, row) == {j for j in masked if view.accept[row, j] < p_commit}
        assert chosen(found.remask, row) == {j for j in committed if view.remask_draw[row, j] < back[j]}
        for j in chosen(found.commit, row):
            assert found.memory["stored"][row, j] == view.log_confidence[row, j]
