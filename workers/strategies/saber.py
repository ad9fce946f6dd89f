"""Saber (arXiv 2510.18165): a bar that follows the block, and tokens taken back where certainty fell."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import (
    BlockView,
    Decision,
    Memory,
    Params,
    best,
    exact_sum,
    prob,
    whole_units,
)


def saber(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    n = params["n"].long()
    ever = memory["ever"] > 0
    num_ever = ever.sum(1)
    total = exact_sum(torch.where(ever, prob(memory["log_confidence"]), 0.0))
    # c > total / num_ever, but so that equal numbers are no larger than their mean; 1 if there are none.
    total = torch.where(num_ever > 0, total, 1.0).unsqueeze(1)
    share = whole_units(prob(view.log_confidence)) * num_ever.clamp(min=1).unsqueeze(1)
    above = view.masked & (share > total)
    few = (above.sum(1) < n).unsqueeze(1)
    commit = torch.where(few, best(view.log_confidence, view.masked, n), above)
    num_commits = commit.sum(1)
    num_due = -(-num_commits // params["mu"].long())
    num_remasks = torch.maximum(n // 2, num_due).minimum(num_commits - 1)
    left = (view.masked & ~commit).any(1)
    drop = prob(memory["log_top"]) - prob(view.log_top)
    remask = best(drop, view.committed | commit, torch.where(left, num_remasks, 0))
    after = {
        "ever": memory["ever"].maximum(commit.float()),
        "log_confidence": torch.where(commit, view.log_confidence, memory["log_confidence"]),
        "log_top": view.log_top,
    }
    return Decision(commit & ~remask, remask & view.committed, after)
