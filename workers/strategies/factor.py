"""Fast-dLLM's factor rule (arXiv 2505.22618): the n-th best is kept while c_(n) >= 1 - f / (n + 1).

The published code commits all m masked positions when only the last fails; `strict` is the paper's (n+1)(1-c)
< f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remask.workers.strategies.view import BlockView, Params, doubt, prob, ranks


def factor(view: BlockView, params: Params) -> Tensor:
    place = ranks(view.log_confidence, view.masked)
    f, strict = params["f"].unsqueeze(1), params["strict"].unsqueeze(1) > 0
    n_plus_1 = place + 2  # n counts from 1
    passes_strict = n_plus_1 * doubt(view.log_confidence) < f
    passes = torch.where(strict, passes_strict, prob(view.log_confidence) >= 1 - f / n_plus_1)
    fails = view.masked & ~passes & (place > 0)
    num_masked = view.masked.sum(1, keepdim=True)
    num_kept = torch.where(fails, place, num_masked).amin(1, keepdim=True)
    num_kept = torch.where(~strict & (num_kept == num_masked - 1), num_masked, num_kept)
    # With one masked position left num_masked - 1 is 0, which is never a failure: the first always passes.
    return view.masked & (place < num_kept.clamp(min=1))
