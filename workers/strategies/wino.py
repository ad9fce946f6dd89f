"""WINO's verification (arXiv 2507.18578): tokens whose leave-one-out probability is below t2 are remasked."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Decision, Memory, Params, best, prob


def wino(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    num_commits = commit.sum(1)
    doubtful = view.committed & (prob(view.log_verified) < params["t2"].unsqueeze(1))
    budget = num_commits if params["budget"] == "cur_accept" else memory["prev_accept"].long()
    num_remasks = doubtful.sum(1).minimum(budget - 1)
    num_remasks = torch.where(num_commits > 1, num_remasks, 0)
    remask = best(-view.log_verified, doubtful, num_remasks)
    return Decision(commit, remask, {"prev_accept": num_commits.float()})
