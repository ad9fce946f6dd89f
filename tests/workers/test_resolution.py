"""Nearly certain positions are ranked correctly, in whole steps over constructed rows with both heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remask import SamplingParams
from remask.scheduler.canvas import TOKEN, Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.models.config import TransformerConfig
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.models.row_ops import EAGER
from remask.workers.rows.pack import PackedRows
from remask.workers.strategies import BlockView
from remask.workers.worker import Worker

PROMPT, CANVAS, VOCAB, MASK = [5, 6], 24, 16, 3
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    max_len=64,
    mask_id=MASK,
    eos_ids=(1,),
    eot_id=None,
    num_layers=1,
    hidden_size=CANVAS,
    num_heads=1,
    num_kv_heads=1,
    head_dim=CANVAS,
    ffn_size=1,
    embedding_size=VOCAB,
    tied_embeddings=True,
    rope_theta=1e4,
    norm_eps=1e-6,
    dtype="float32",
)


class Table:
    """A model that answers every row with the logits of its slot, whatever it sees."""

    def __init__(self, logits_GV: Tensor) -> None:
        self.config, self.embedding, self.logits_GV = CONFIG, torch.zeros(VOCAB, CANVAS), logits_GV
        self.head_weight = logits_GV.T.contiguous()

    def __call__(self, rows: PackedRows, *_: Any) -> Tensor:
        return torch.eye(CANVAS)[rows.positions_T[rows.candidates_H] - len(PROMPT)]

    def normed(self, x_ND: Tensor, ops: Any = EAGER) -> Tensor:
        return x_ND

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.logits_GV


def model_of(doubts: list[float], *, fused: bool) -> TransformerDenoiser:
    """The doubt about a slot is 1 minus the probability of token 9; the other tokens share it."""
    doubt_G1 = torch.tensor(doubts, dtype=torch.float64).unsqueeze(1)
    logits_GV = (doubt_G1 / (1 - doubt_G1) / (VOCAB - 1)).log().expand(-1, VOCAB).float()
    logits_GV = logits_GV.index_fill(1, torch.tensor(9), 0.0)
    table: Any = Table(logits_GV)
    return TransformerDenoiser(table, SdpaAttention(), pack_rows=1 << 30, static_shapes=fused, kernels=fused)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "fused"])
def nearly_sure(request: pytest.FixtureRequest) -> tuple[TransformerDenoiser, list[int]]:
    """A model, and its slots in ascending order of doubt, from 1e-14 to 1e-3 in factors of three."""
    order = np.random.default_rng(0).permutation(CANVAS)
    doubts = np.empty(CANVAS)
    doubts[order] = np.geomspace(1e-14, 1e-3, CANVAS)
    return model_of(doubts.tolist(), fused=request.param), order.tolist()


def make(fields: dict[str, Any]) -> Canvas:
    params = resolve(SamplingParams(max_tokens=CANVAS, block_length=CANVAS, **fields))
    return new_canvas("r", 0, PROMPT, params, seed=3, sample=0, mask_id=MASK, stop_ids=[])


def step(model: TransformerDenoiser, canvas: Canvas, state: CanvasState) -> CanvasState:
    batch = StepBatch(burst_id=0, num_steps=1, specs=[canvas.spec], states=[state])
    (after,) = Worker(model).run(batch).states
    assert after.fault == 0
    return after


def held(state: CanvasState) -> set[int]:
    """Slots that hold a token."""
    tokens = np.frombuffer(state.tokens, TOKEN)[len(PROMPT) :]
    return set(np.flatnonzero(tokens != MASK).tolist())


COMMITS = {  # number of the surest slots that a first step commits; None: other tests check the number
    "schedule:4": 6,
    "schedule:4,score=margin": 6,
    "schedule:4,score=entropy": 6,
    "capped_threshold:0.6": 16,
    "factor:1e-8": None,
    "factor:1e-8,strict=true": None,
    "entropy_bound:1e-7": None,
    "entropy_bound:1e-7,order=confidence": None,
    "entropy_bound:1e-7,order=margin": None,
    "threshold:0.999999999": None,
    "dream:4": 5,
    "dream:4,alg=maskgit_plus": 5,
    "dream:4,alg=topk_margin": 5,
    "schedule:4 rcr": 6,
    "schedule:4 rcr:conf=margin": 6,
    "schedule:4 rcr:conf=entropy": 6,
    "saber:n=6": 3,  # six, of which it takes back the three least sure
}


@pytest.mark.parametrize("policies", COMMITS)
def test_the_surest_positions_are_committed(
    nearly_sure: tuple[TransformerDenoiser, list[int]], policies: str
) -> None:
    model, order = nearly_sure
    names = ["remask"] if "saber" in policies else ["unmask", "remask"]
    canvas = make(dict(zip(names, policies.split(), strict=False)))
    found = held(step(model, canvas, canvas.state))
    assert 1 < len(found) < CANVAS
    assert found == set(order[: COMMITS[policies] or len(found)])


@pytest.mark.parametrize("remask", ["wino:1,cur_accept", "oracle_loo:1,cur_accept", "low_prob:1"])
def test_the_least_sure_positions_are_taken_back(
    nearly_sure: tuple[TransformerDenoiser, list[int]], remask: str
) -> None:
    model, order = nearly_sure
    canvas = make({"unmask": "capped_threshold:0.6", "remask": remask})
    before = step(model, canvas, canvas.state)
    after = step(model, canvas, before)
    assert held(before) == set(order[:16])
    assert held(before) - held(after) == set(order[12:16])


def test_a_threshold_of_1_is_met_by_what_is_1_in_fp64() -> None:
    doubts = [1e-3] * CANVAS
    doubts[3], doubts[7], doubts[11], doubts[20] = 1e-17, 1e-9, 1e-15, 1e-18
    model = model_of(doubts, fused=False)
    canvas = make({"unmask": "threshold:1.0"})
    assert held(step(model, canvas, canvas.state)) == {3, 20}
    canvas = make({"unmask": "schedule:2", "remask": "wino:t2=1"})
    before = step(model, canvas, canvas.state)
    first, second = held(before), held(step(model, canvas, before))
    assert len(first) == 12
    assert first & second == {3, 20}
    assert len(second) == 14


def test_a_view_tells_probabilities_to_packages_that_ask_for_them() -> None:
    masked = torch.tensor([[True, True, False]])
    log_p, nothing = torch.tensor([[0.0, -1.0, -torch.inf]]), torch.zeros(1, 3)
    view = BlockView(
        masked=masked,
        committed=~masked,
        log_confidence=log_p,
        log_verified=log_p - 1,
        log_margin=log_p - 2,
        neg_entropy=nothing,
        log_visible=log_p - 3,
        log_top=log_p - 4,
        order=nothing,
        accept=nothing,
        remask_draw=nothing,
        block_forwards=torch.zeros(1, dtype=torch.int64),
    )
    p = log_p.exp()

    def probabilities(view: BlockView) -> list[Tensor]:
        return [view.confidence, view.verified, view.margin, view.visible, view.top]

    found = torch.compile(probabilities, fullgraph=True, backend="eager")(view)
    assert found[0].tolist() == [[1.0, float(p[0, 1]), -torch.inf]]
    for own, shift in zip(found[1:], range(1, 5), strict=True):
        torch.testing.assert_close(own, p * math.exp(-shift))
