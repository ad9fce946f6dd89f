"""Targeted remasking: visible tokens that have become improbable at their own row turn back into masks."""

from __future__ import annotations

from torch import Tensor

from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best, prob


def low_prob(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    num_candidates = view.committed.sum(1)
    budget = (params["max_share"] * num_candidates).floor().long().clamp(min=1)
    may_go = memory["times"] < params["max_times"].unsqueeze(1)
    doubtful = view.committed & may_go & (prob(view.log_visible) < params["t"].unsqueeze(1))
    remask = best(-view.log_visible, doubtful, budget)
    # Forwards after the last mask continue until one of them remasks nothing.
    was_full, is_full = ~view.masked.any(1), ~(view.masked & ~commit).any(1) & ~remask.any(1)
    posts = memory["posts"] + was_full
    holds = is_full & ~was_full & (posts < params["post_steps"])
    return Decision(commit, remask, {"times": memory["times"] + remask, "posts": posts}, holds)
