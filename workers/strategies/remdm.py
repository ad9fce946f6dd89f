"""ReMDM (arXiv 2503.00307): tokens are committed and taken back by chance, as a time schedule wants it."""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Decision, Memory, Params, exact_sum, prob

LAST_TIME = 1e-5


def remdm(view: BlockView, commit: Tensor, params: Params, memory: Memory) -> Decision:
    steps, done = params["block_steps"], view.block_forwards.double()
    slope = (1 - LAST_TIME) / steps
    alpha_t, alpha_s = slope * done, (slope * (done + 1)).clamp(max=1 - LAST_TIME)
    sigma_max = ((1 - alpha_s) / alpha_t.clamp(min=1e-30)).clamp(max=1)
    if params["schedule"] == "conf":
        weight = torch.where(view.committed, torch.exp(-prob(memory["stored"])), 0.0)
        share = weight / exact_sum(weight).clamp(min=1e-30).unsqueeze(1)
        takes_back = share * sigma_max.unsqueeze(1)
        owed = alpha_s - alpha_t
    else:
        eta = params["eta"]
        sigma = eta * sigma_max if params["schedule"] == "rescale" else eta.minimum(sigma_max)
        takes_back = sigma.unsqueeze(1)
        # What is taken back must be committed again for the share of masks to follow the schedule.
        owed = alpha_s - (1 - sigma) * alpha_t
    commits = owed / (1 - alpha_t).clamp(min=LAST_TIME)
    is_over = (done >= steps).unsqueeze(1)
    commit = view.masked & (is_over | (view.accept < commits.unsqueeze(1)))
    remask = view.committed & ~is_over & (view.remask_draw < takes_back)
    stored = torch.where(commit, view.log_confidence, memory["stored"])
    return Decision(commit, remask, {"stored": stored}, takes_top=is_over.squeeze(1))
