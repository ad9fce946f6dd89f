"""The control arm: as many positions as another policy would remask, drawn from the same candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.low_prob import low_prob
from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best
from remask.workers.strategies.wino import wino


def random_remask(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    # Both policies it may stand for are asked; "low_prob" is the second of the spec's choices.
    is_low_prob = params["like"] > 0
    by_wino = wino(view, commit, params, memory)
    by_low_prob = low_prob(view, commit, params, memory)
    count = torch.where(is_low_prob, by_low_prob.remask.sum(1), by_wino.remask.sum(1))
    may_go = memory["times"] < params["max_times"].unsqueeze(1)
    candidates = view.committed & (may_go | ~is_low_prob.unsqueeze(1))
    remask = best(view.remask_draw, candidates, count)
    holds = by_low_prob.holds & is_low_prob if by_low_prob.holds is not None else None
    after = {**by_wino.memory, "posts": by_low_prob.memory["posts"], "times": memory["times"] + remask}
    return Decision(commit, remask, after, holds)
