"""Saber (arXiv 2510.18165): a bar that follows the block, and tokens taken back where certainty fell."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best, exact_sum


def saber(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    n = params["n"].long()
    ever = memory["ever"] > 0
    mean = exact_sum(torch.where(ever, memory["last_confidence"], 0.0)) / ever.sum(1).clamp(min=1)
    bar = torch.where(ever.any(1), mean, 1.0).unsqueeze(1)
    above = view.masked & (view.confidence > bar)
    few = (above.sum(1) < n).unsqueeze(1)
    commit = torch.where(few, best(view.confidence, view.masked, n), above)
    num_commits = commit.sum(1)
    share = -(-num_commits // params["mu"].long())
    num_remasks = torch.maximum(n // 2, share).minimum(num_commits - 1)
    left = (view.masked & ~commit).any(1)
    drop = memory["top_before"] - view.top
    remask = best(drop, view.committed | commit, torch.where(left, num_remasks, 0))
    after = {
        "ever": memory["ever"].maximum(commit.float()),
        "last_confidence": torch.where(commit, view.confidence, memory["last_confidence"]),
        "top_before": view.top,
    }
    return Decision(commit & ~remask, remask & view.committed, after)
