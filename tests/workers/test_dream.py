"""Dream's decoding against a plain loop in the shape of its published code, one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remask import Dream, SamplingParams, Wino
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows
from remask.workers.worker import Worker

PROMPT = [33, 11, 12, 14]
LENGTH = 24


def canvas(**fields: Any) -> Canvas:
    params = resolve(SamplingParams(max_tokens=LENGTH, **fields))
    return new_canvas("r", 0, PROMPT, params, seed=5, sample=0, mask_id=0, stop_ids=[])


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with all but the most probable tokens that hold `top_p` at -inf."""
    ordered, ids = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    drop = before >= top_p
    return logits.scatter(-1, ids, ordered.masked_fill(drop, -torch.inf))


@torch.inference_mode()
def published(model: TransformerDenoiser, steps: int, alg: str, top_p: float) -> list[int]:
    ids = torch.tensor(PROMPT + [0] * LENGTH)
    every, bounds = torch.arange(len(ids)), (0, len(ids))
    layout = VarlenLayout(bounds, bounds, ())
    times = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = (ids == 0).nonzero().squeeze(1)
        rows = PackedRows(ids, every, layout, every, layout, every, len(ids))
        logits = model.model.logits(model.model(rows, model.attention)).float()[masked]
        logits[:, 0] = -torch.inf
        p = nucleus(logits, top_p).softmax(-1) if top_p < 1 else logits.softmax(-1)
        confidence, proposal = p.max(-1)
        if alg == "topk_margin":
            best = p.topk(2).values
            confidence = best[:, 0] - best[:, 1]
        elif alg == "entropy":
            confidence = (p * (p + 1e-10).log()).sum(-1)
        count = int(len(masked) * (1 - times[i + 1] / times[i])) if i < steps - 1 else len(masked)
        chosen = confidence.topk(count).indices
        ids[masked[chosen]] = proposal[chosen]
    return ids[len(PROMPT) :].tolist()


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [3, 12, LENGTH])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_its_tokens_are_those_of_the_published_loop(
    golden_model: TransformerDenoiser, alg: Any, steps: int, top_p: float
) -> None:
    own = canvas(unmask=Dream(steps, alg), top_p=top_p)
    beside = canvas(unmask="threshold:0.5", remask=Wino(), block_length=8)
    batch = StepBatch(
        burst_id=0, num_steps=100, specs=[beside.spec, own.spec], states=[beside.state, own.state]
    )
    state = Worker(golden_model).run(batch).states[1]
    assert state.token_array()[len(PROMPT) :].tolist() == published(golden_model, steps, alg, top_p)
    assert state.num_forwards <= steps


@torch.inference_mode()
def test_confidence_is_that_of_the_softmax_drawn_from(golden_model: TransformerDenoiser) -> None:
    """A token's reported confidence is its share among the two most probable tokens at the temperature."""
    own = canvas(unmask=Dream(1, "maskgit_plus"), temperature=2.0, top_k=2)
    batch = StepBatch(burst_id=0, num_steps=1, specs=[own.spec], states=[own.state])
    (state,) = Worker(golden_model).run(batch).states
    ids = torch.tensor(PROMPT + [0] * LENGTH)
    every, bounds = torch.arange(len(ids)), (0, len(ids))
    layout = VarlenLayout(bounds, bounds, ())
    rows = PackedRows(ids, every, layout, every, layout, every, len(ids))
    logits = golden_model.model.logits(golden_model.model(rows, golden_model.attention)).float()[4:]
    logits[:, 0] = -torch.inf
    best = logits.topk(2)
    p = (best.values / 2).softmax(-1)
    tokens = torch.from_numpy(state.token_array()[4:].astype(np.int64)).unsqueeze(1)
    assert bool((best.indices == tokens).any(1).all())
    expected = (p * (best.indices == tokens)).sum(1)
    np.testing.assert_allclose(np.frombuffer(state.confidences, np.float32), expected.numpy(), rtol=1e-4)
