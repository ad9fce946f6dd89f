"""Policy kernels: their rules over random states, against plain Python, and compiled as they stand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    LowProb,
    OracleLoo,
    RandomRemask,
    Rcr,
    Remdm,
    Saber,
    Schedule,
    Threshold,
    Wino,
)
from remask.scheduler.policies import RemaskPolicy
from remask.workers.burst.groups import PolicyGroup, group_policies
from remask.workers.keyed_random import stream_keys, uniform_at
from remask.workers.strategies.view import BlockView, Decision

KINDS = st.sampled_from(["any", "coarse", "sure"])
UNMASKS = (
    Schedule(),
    Schedule(5),
    Schedule(7, "random"),
    Schedule(3, "margin"),
    Schedule(9, "entropy"),
    Threshold(0.5),
    Threshold(1.0),
    Factor(1.0),
    Factor(0.5, strict=True),
    CappedThreshold(0.3),
    CappedThreshold(1.0),
    EntropyBound(),
    EntropyBound(2.0),
    EntropyBound(1.0, "confidence"),
    EntropyBound(0.5, "margin"),
    Bernoulli(),
    Bernoulli(4.0),
)


def random_view(seed: int, rows: int, width: int, kind: str = "any") -> BlockView:
    """Random states; "coarse" rounds the numbers so that there are ties, under "sure" all probabilities but
    those near 1 are rare."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        numbers = torch.rand(rows, width, generator=generator)
        return (numbers * 4).round() / 4 if kind == "coarse" else numbers

    def log_prob() -> Tensor:
        numbers = random()
        return -(10 ** (1 - 13 * numbers.double())).float() if kind == "sure" else numbers.log()

    masked = random() < 0.6
    masked[torch.arange(rows), torch.randint(width, (rows,), generator=generator)] = True
    committed = ~masked & (random() < 0.9)
    return BlockView(
        masked=masked,
        committed=committed,
        log_confidence=torch.where(masked, log_prob(), -torch.inf),
        log_verified=torch.where(committed, log_prob(), 0.0),
        log_margin=log_prob(),
        neg_entropy=-random(),
        log_visible=torch.where(committed, log_prob(), 0.0),
        log_top=torch.where(masked | committed, log_prob(), -torch.inf),
        order=random(),
        accept=random().clamp(0.01, 0.99),
        remask_draw=random(),
        block_forwards=torch.randint(6, (rows,), generator=generator),
    )


def group_of(policy: Any, rows: int, width: int, beside: Any = None) -> PolicyGroup:
    if isinstance(policy, RemaskPolicy):
        params = policy.block_params([width], beside)
    else:
        params = policy.block_params([width])
    (group,) = group_policies([policy] * rows, [params] * rows)
    return group


def commits(policy: Any, view: BlockView) -> Tensor:
    rows, width = view.masked.shape
    group = group_of(policy, rows, width)
    return group.kernel(view, group.params_at(torch.zeros(rows, dtype=torch.int64)))


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


@pytest.mark.parametrize("num_masked", [1, 2, 3])
def test_the_factor_rule_commits_the_last_one_too_when_only_that_one_fails(num_masked: int) -> None:
    view = random_view(0, 1, 3)
    masked = torch.arange(3).unsqueeze(0) < num_masked
    log_confidence = torch.where(masked, torch.tensor([0.9, 0.1, 0.1]).log(), -torch.inf)
    view = view._replace(masked=masked, log_confidence=log_confidence)
    assert int(commits(Factor(1.0), view).sum()) == (2 if num_masked == 2 else 1)


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


def decide(
    policy: Any,
    view: BlockView,
    commit: Tensor,
    memory: dict[str, Tensor] | None = None,
    beside: Any = None,
) -> Decision:
    rows, width = view.masked.shape
    group = group_of(policy, rows, width, beside)
    params = group.params_at(torch.zeros(rows, dtype=torch.int64))
    return group.kernel(view, commit, params, memory or group.initial_memory(width))


def chosen(flags: Tensor, row: int) -> set[int]:
    return set(flags[row].nonzero().squeeze(1).tolist())


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


DREAMS = (
    Dream(),
    Dream(5),
    Dream(9, "maskgit_plus"),
    Dream(4, "topk_margin", eps=0.1),
    Dream(8, "origin"),
    Dream(60, "origin"),
    Dream(6, "entropy", alg_temp=0.5),
    Dream(6, "maskgit_plus", alg_temp=0.5),
)


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


REMASKS = (
    Wino(),
    Wino(budget="cur_accept"),
    OracleLoo(),
    Rcr(),
    Saber(),
    Remdm(5),
    Remdm(5, "conf"),
    LowProb(post_steps=2),
    RandomRemask(),
    RandomRemask("low_prob"),
)


@pytest.mark.parametrize("policy", [*UNMASKS, *DREAMS, *REMASKS], ids=str)
def test_padding_of_longer_blocks_beside_changes_no_bit(policy: Any) -> None:
    view = random_view(11, 50, 13)
    wider = BlockView(
        *(
            torch.nn.functional.pad(
                x, (0, 50), value=-torch.inf if name in ("log_confidence", "log_top") else 0
            )
            if x.ndim == 2
            else x
            for name, x in zip(BlockView._fields, view, strict=True)
        )
    )
    found = []
    for each in (view, wider):
        if isinstance(policy, RemaskPolicy):
            group = group_of(policy, 50, 13, Schedule())
            memory = group.initial_memory(each.masked.shape[1])
            for name, number in memory.items():
                memory[name] = number + (each.accept if number.ndim == 2 else 0)
            commit = torch.nn.functional.pad(
                commits(CappedThreshold(0.3), view), (0, each.masked.shape[1] - 13)
            )
            params = group.params_at(torch.zeros(50, dtype=torch.int64))
            decision = group.kernel(each, commit, params, memory)
            found.append((decision.commit[:, :13], decision.remask[:, :13]))
        else:
            group = group_of(policy, 50, 13)
            found.append((group.kernel(each, group.params_at(torch.zeros(50, dtype=torch.int64)))[:, :13],))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("policy", [*UNMASKS, *DREAMS, *REMASKS], ids=str)
def test_kernels_have_no_data_dependent_control_flow(policy: Any) -> None:
    """`fullgraph=True` raises at the first break of the graph."""
    view, rows, width = random_view(3, 4, 12), 4, 12
    group = group_of(policy, rows, width, Schedule())
    params = group.params_at(torch.zeros(rows, dtype=torch.int64))
    arguments: tuple[Any, ...] = (view, params)
    if isinstance(policy, RemaskPolicy):
        arguments = (view, commits(Threshold(0.5), view), params, group.initial_memory(width))
    torch._dynamo.reset()
    compiled = torch.compile(group.kernel, fullgraph=True, backend="eager")
    got, expected = compiled(*arguments), group.kernel(*arguments)
    if isinstance(policy, RemaskPolicy):
        assert got.memory.keys() == expected.memory.keys() == group.initial_memory(width).keys()
        for name in expected.memory:
            assert torch.equal(got.memory[name], expected.memory[name])
        assert torch.equal(got.commit, expected.commit)
        got, expected = got.remask, expected.remask
    assert torch.equal(got, expected)
