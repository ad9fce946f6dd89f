"""Random states of blocks, and calls of policy kernels on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from remask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    Schedule,
    Threshold,
)
from remask.scheduler.policies import RemaskPolicy
from remask.workers.burst.groups import PolicyGroup, group_policies
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
