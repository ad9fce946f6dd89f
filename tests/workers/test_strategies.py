"""Policy kernels: their rules over random states, against plain Python, and compiled as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remask import Bernoulli, CappedThreshold, EntropyBound, Factor, Schedule, Threshold, Wino
from remask.workers.strategies import REMASK, UNMASK
from remask.workers.strategies.groups import PolicyGroup, group_policies
from remask.workers.strategies.view import BlockView

CPU = torch.device("cpu")
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


def random_view(seed: int, rows: int, width: int, *, coarse: bool = False) -> BlockView:
    """Random states; `coarse` rounds the numbers so that there are ties."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        numbers = torch.rand(rows, width, generator=generator)
        return (numbers * 4).round() / 4 if coarse else numbers

    masked = random() < 0.6
    masked[torch.arange(rows), torch.randint(width, (rows,), generator=generator)] = True
    committed = ~masked & (random() < 0.9)
    return BlockView(
        masked=masked,
        committed=committed,
        confidence=torch.where(masked, random(), -torch.inf),
        verified=torch.where(committed, random(), 1.0),
        margin=random(),
        neg_entropy=-random(),
        order=random(),
        accept=random().clamp(0.01, 0.99),
        block_forwards=torch.randint(6, (rows,), generator=generator),
    )


def group_of(policy: Any, rows: int, width: int) -> PolicyGroup[Any]:
    kernels: dict[str, Any] = REMASK if isinstance(policy, Wino) else UNMASK
    (group,) = group_policies([policy] * rows, [[width]] * rows, kernels, CPU)
    return group


def commits(policy: Any, view: BlockView) -> Tensor:
    rows, width = view.masked.shape
    group = group_of(policy, rows, width)
    return group.kernel(view, group.params_at(torch.zeros(rows, dtype=torch.int64)))


def expected_commits(policy: Any, view: BlockView, row: int) -> set[int]:
    """The rules of the papers and reference decoders in plain Python, one canvas at a time."""
    masked = [j for j, m in enumerate(view.masked[row].tolist()) if m]
    c = view.confidence[row].tolist()
    by_confidence = sorted(masked, key=lambda j: (-c[j], j))
    if isinstance(policy, Threshold):
        return {j for j in masked if c[j] >= policy.t} | {by_confidence[0]}
    if isinstance(policy, CappedThreshold):
        cap = min(max(int(0.7 * len(masked)), 5), 20)
        good = [j for j in by_confidence if c[j] > torch.tensor(policy.t1)]
        return set(good[:cap]) or {by_confidence[0]}
    if isinstance(policy, Schedule):
        scores = {"confidence": c, "margin": view.margin[row].tolist(), "random": view.order[row].tolist()}
        score = scores.get(policy.score, view.neg_entropy[row].tolist())
        steps_left = (policy.steps or view.masked.shape[1]) - int(view.block_forwards[row])
        count = -(-len(masked) // steps_left) if steps_left > 0 else 1
        return set(sorted(masked, key=lambda j: (-score[j], j))[:count])
    if isinstance(policy, Bernoulli):
        drawn = {j for j in masked if view.accept[row, j] < view.confidence[row, j] ** policy.k}
        return drawn or {by_confidence[0]}
    if isinstance(policy, EntropyBound):
        entropy = (-view.neg_entropy[row]).tolist()
        scores = {"confidence": c, "margin": view.margin[row].tolist(), "entropy": [-h for h in entropy]}
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
        passes = (n + 1) * (1 - c[j]) < policy.f if policy.strict else c[j] >= 1 - policy.f / (n + 1)
        if n > 1 and not passes:
            break
        kept = n
    if not policy.strict and kept == len(masked) - 1:
        kept = len(masked)
    return set(by_confidence[: max(kept, 1)])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40), coarse=st.booleans())
@pytest.mark.parametrize("policy", UNMASKS, ids=str)
def test_commits_are_those_of_the_published_rule(policy: Any, seed: int, width: int, coarse: bool) -> None:
    view = random_view(seed, 6, width, coarse=coarse)
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


@pytest.mark.parametrize("num_masked", [1, 2, 3])
def test_the_factor_rule_commits_the_last_one_too_when_only_that_one_fails(num_masked: int) -> None:
    view = random_view(0, 1, 3)
    masked = torch.arange(3).unsqueeze(0) < num_masked
    confidence = torch.where(masked, torch.tensor([0.9, 0.1, 0.1]), -torch.inf)
    view = view._replace(masked=masked, confidence=confidence)
    assert int(commits(Factor(1.0), view).sum()) == (2 if num_masked == 2 else 1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    t2=st.floats(0, 1),
    budget=st.sampled_from(["prev_accept", "cur_accept"]),
    coarse=st.booleans(),
)
def test_wino_remasks_the_least_probable_within_its_budget(
    seed: int, width: int, t2: float, budget: Any, coarse: bool
) -> None:
    view, policy = random_view(seed, 6, width, coarse=coarse), Wino(t2, budget=budget)
    commit = commits(CappedThreshold(0.5), view)
    group = group_of(policy, 6, width)
    previous = torch.randint(1, 31, (6,), generator=torch.Generator().manual_seed(seed)).float()
    params = group.params_at(torch.zeros(6, dtype=torch.int64))
    remask, memory = group.kernel(view, commit, params, {"prev_accept": previous})
    assert torch.equal(memory["prev_accept"], commit.sum(1).float())
    for row in range(6):
        r = view.verified[row].tolist()
        num_commits = int(commit[row].sum())
        limit = int(previous[row]) if budget == "prev_accept" else num_commits
        doubtful = [j for j in range(width) if view.committed[row, j] and r[j] < torch.tensor(t2)]
        if num_commits <= 1:
            doubtful = []
        elif len(doubtful) >= limit:
            doubtful = sorted(doubtful, key=lambda j: (r[j], j))[: limit - 1]
        assert set(remask[row].nonzero().squeeze(1).tolist()) == set(doubtful)


@pytest.mark.parametrize("policy", [*UNMASKS, Wino(), Wino(budget="cur_accept")], ids=str)
def test_kernels_have_no_data_dependent_control_flow(policy: Any) -> None:
    """`fullgraph=True` raises at the first break of the graph."""
    view, rows, width = random_view(3, 4, 12), 4, 12
    group = group_of(policy, rows, width)
    params = group.params_at(torch.zeros(rows, dtype=torch.int64))
    arguments: tuple[Any, ...] = (view, params)
    if isinstance(policy, Wino):
        arguments = (view, commits(Threshold(0.5), view), params, group.initial_memory(width))
    torch._dynamo.reset()
    compiled = torch.compile(group.kernel, fullgraph=True, backend="eager")
    got, expected = compiled(*arguments), group.kernel(*arguments)
    if isinstance(policy, Wino):
        (got, memory), (expected, expected_memory) = got, expected
        assert torch.equal(memory["prev_accept"], expected_memory["prev_accept"])
    assert torch.equal(got, expected)
