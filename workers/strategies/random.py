"""The control arm: as many positions as another policy would remask, drawn from the same candidates."""

from __future__ import annotations

from torch import Tensor

from remask.workers.strategies.low_prob import low_prob
from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best
from remask.workers.strategies.wino import wino


def random(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    candidates = view.committed
    if params["like"] == "wino":
        model = wino(view, commit, params, memory)
    else:
        model = low_prob(view, commit, params, memory)
        candidates = candidates & (memory["times"] < params["max_times"].unsqueeze(1))
    remask = best(view.remask_draw, candidates, model.remask.sum(1))
    after = {**memory, **model.memory, "times": memory["times"] + remask}
    return Decision(commit, remask, after, model.holds)
