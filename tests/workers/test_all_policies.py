"""Properties of all policy kernels: padding changes no bit, and no control flow depends on data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_states import DREAMS, UNMASKS, commits, group_of, random_view

from remask import (
    CappedThreshold,
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
from remask.workers.strategies.view import BlockView

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
def test_padding_to_longer_blocks_changes_no_bit(policy: Any) -> None:
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
