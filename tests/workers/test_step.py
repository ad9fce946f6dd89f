"""The denoising step on the golden model: bounds, identities, and shadow rows that no other row sees."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_cases import POLICIES, PROMPT, burst, canvas, finish

from remask import (
    CappedThreshold,
    Dream,
    InvalidRequest,
    LowProb,
    OracleLoo,
    RandomRemask,
    Rcr,
    Remdm,
    Saber,
    SamplingParams,
    Schedule,
    Threshold,
    Wino,
)
from remask.scheduler.canvas import EVENT, REAL, TOKEN, Canvas
from remask.scheduler.params import resolve
from remask.scheduler.policies.base import share_steps
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Worker

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"

requests = st.builds(
    lambda policy, canvas_len, block_len, temperature, rank, prompt_len: canvas(
        SamplingParams(
            **{
                "max_tokens": canvas_len,
                "block_length": min(block_len, canvas_len),
                "temperature": temperature,
                "rank": rank,
                "trace": True,
                **policy,
            },
        ),
        (PROMPT * 5)[:prompt_len],
    ),
    st.sampled_from(POLICIES),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.8, 2.0]),
    st.sampled_from(["proposal", "top"]),
    st.integers(1, 20),
)
slow_model = settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def most_forwards(own: Canvas) -> int:
    """The bound that the policies promise."""
    unmask, remask, canvas_len = own.spec.unmask, own.spec.remask, own.spec.canvas_len
    if isinstance(unmask, Dream):
        return unmask.steps or canvas_len
    if isinstance(remask, Rcr):
        return sum(share_steps(unmask.steps, own.spec.block_lens))
    if isinstance(remask, Remdm):
        steps = share_steps(remask.steps or canvas_len, own.spec.block_lens)
        return sum(steps) + len(steps)
    if isinstance(remask, LowProb) or (isinstance(remask, RandomRemask) and remask.like == "low_prob"):
        return canvas_len * (1 + remask.max_times) + remask.post_steps * len(own.spec.block_lens)
    return canvas_len


@slow_model
@given(canvases=st.lists(requests, min_size=1, max_size=4))
def test_every_canvas_fills_up_within_its_forwards_and_never_with_the_mask(
    golden_model: TransformerDenoiser, canvases: list[Canvas]
) -> None:
    for own, state in zip(canvases, finish(golden_model, canvases), strict=True):
        tokens = state.token_array()
        assert not (tokens[np.frombuffer(own.spec.slots, TOKEN)] == 0).any()
        assert (tokens[: len(tokens) - own.spec.canvas_len] != 0).all()
        assert state.num_forwards <= most_forwards(own)
        events = np.frombuffer(b"".join(own.events), EVENT)
        assert (events["token"] != 0).all(), "the mask is neither committed nor removed"
        signs = np.where(events["is_commit"] > 0, 1, -1)
        balance = np.bincount(events["slot"] // own.spec.block_length, weights=signs)
        assert balance.tolist() == own.spec.block_lens, "commits less remaskings, block by block"
        steps = np.frombuffer(state.commit_steps, TOKEN)
        assert steps.min() >= 1
        if own.spec.remask is None or not getattr(own.spec.remask, "post_steps", 0):
            assert steps.max() == state.num_forwards
        confidences = np.frombuffer(state.confidences, REAL)
        assert (confidences > 0).all()
        assert (confidences <= 1).all()


@slow_model
@given(canvases=st.lists(requests, min_size=2, max_size=4), num_steps=st.integers(1, 5))
def test_other_canvases_and_burst_lengths_change_no_token(
    golden_model: TransformerDenoiser, canvases: list[Canvas], num_steps: int
) -> None:
    together = finish(golden_model, canvases, num_steps)
    for own, state in zip(canvases, together, strict=True):
        (alone,) = finish(golden_model, [own])
        assert state.tokens == alone.tokens
        assert state.num_forwards == alone.num_forwards
        assert state.commit_steps == alone.commit_steps


@pytest.mark.parametrize(
    "policy",
    [
        {"unmask": CappedThreshold(0.05), "remask": Wino(0.9)},
        {"unmask": CappedThreshold(0.05), "remask": Wino(0.95, budget="cur_accept")},
        {"unmask": Schedule(6), "remask": Wino(0.9)},
        {"unmask": Threshold(0.05), "remask": LowProb(0.6, max_times=3, post_steps=4)},
        {"remask": Saber(4, 2)},
        {"unmask": CappedThreshold(0.05), "remask": RandomRemask()},
        {"unmask": CappedThreshold(0.05), "remask": OracleLoo()},
        {"unmask": Schedule(8), "remask": Rcr()},
        {"remask": Remdm(20, "rescale", 0.5)},
    ],
    ids=str,
)
def test_commits_minus_remasks_equal_the_canvas(golden_model: TransformerDenoiser, policy: dict) -> None:
    own = canvas(SamplingParams(max_tokens=40, block_length=40, temperature=2.0, rank="top", **policy))
    state, balance, num_remasks = own.state, 0, 0
    while not state.finished:
        before = state.token_array() == 0
        (state,) = Worker(golden_model).run(burst([own], [state], 1)).states
        after = state.token_array() == 0
        num_remasks += int((after & ~before).sum())
        balance += int((before & ~after).sum()) - int((after & ~before).sum())
    assert balance == 40
    assert num_remasks > 0, "the case is meant to remask"


@pytest.mark.parametrize("block_length", [8, 13, 40])
def test_wino_that_doubts_nothing_is_its_draft_rule(
    golden_model: TransformerDenoiser, block_length: int
) -> None:
    params = {"max_tokens": 40, "block_length": block_length, "unmask": CappedThreshold(0.4)}
    plain, verified = (canvas(SamplingParams(**params, remask=remask)) for remask in (None, Wino(0.0)))
    a, b = finish(golden_model, [plain, verified])
    assert (a.tokens, a.num_forwards, a.commit_steps) == (b.tokens, b.num_forwards, b.commit_steps)


def test_ranking_by_top_and_by_proposal_agree_at_temperature_0(golden_model: TransformerDenoiser) -> None:
    a, b = (canvas(SamplingParams(max_tokens=32, rank=rank)) for rank in ("proposal", "top"))
    first, second = finish(golden_model, [a, b])
    assert first.tokens == second.tokens


def test_seed_and_sample_decide_what_is_drawn(golden_model: TransformerDenoiser) -> None:
    params = SamplingParams(max_tokens=32, temperature=1.5, rank="top")
    a, b, c = finish(golden_model, [canvas(params, seed=1), canvas(params, seed=1), canvas(params, seed=2)])
    assert a == b
    assert a.tokens != c.tokens


def test_blocks_go_on_after_the_last_mask_until_nothing_is_improbable(
    golden_model: TransformerDenoiser,
) -> None:
    params = {
        "max_tokens": 40,
        "block_length": 20,
        "unmask": Threshold(0.05),
        "temperature": 2.0,
        "rank": "top",
    }
    short, long = (
        canvas(SamplingParams(**params, remask=LowProb(0.6, max_times=3, post_steps=posts)))
        for posts in (0, 16)
    )
    ended, went_on = finish(golden_model, [short, long])
    assert went_on.num_forwards >= ended.num_forwards + 2, "a forward after each of the two blocks at least"
    committed = np.frombuffer(went_on.commit_steps, TOKEN)
    assert went_on.num_forwards > committed.max(), "the last forward remasks nothing"
    params["temperature"] = 0.0  # what is drawn depends on the number of the forward
    never = canvas(SamplingParams(**params, remask=LowProb(0.0, post_steps=16)))
    (state,) = finish(golden_model, [never])
    (plain,) = finish(golden_model, [canvas(SamplingParams(**params))])
    assert state.tokens == plain.tokens
    assert state.num_forwards == plain.num_forwards + 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"unmask": Threshold(), "remask": Saber()}, "unmask"),
        ({"remask": "random:like=wino,t=0.5"}, "remask.t"),
        ({"remask": "random:like=low_prob,t2=0.5"}, "remask.t2"),
        ({"unmask": "dream", "remask": "wino"}, "remask"),
        ({"unmask": "dream", "remask": "low_prob"}, "remask"),
        ({"unmask": "dream", "remask": "random"}, "remask"),
        ({"unmask": "dream", "remask": "oracle_loo"}, "remask"),
        ({"unmask": "dream", "block_length": 8}, "block_length"),
        ({"remask": "rcr"}, "remask"),
        ({"unmask": "threshold", "remask": "rcr"}, "remask"),
        ({"unmask": "schedule:score=random", "remask": "rcr"}, "unmask.score"),
        ({"unmask": "schedule", "remask": "remdm"}, "unmask"),
        ({"remask": "remdm:schedule=conf,eta=0.1"}, "remask.eta"),
        ({"remask": "oracle_loo", "cfg_scale": 1.0}, "cfg_scale"),
        ({"remask": "saber:n=0"}, "remask.n"),
    ],
    ids=str,
)
def test_pairs_that_cannot_work_are_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(fields)
    assert caught.value.parameter == named


def test_a_later_forward_draws_other_tokens_from_the_same_canvas(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=32, temperature=5.0, rank="top", unmask=Schedule(1)))
    later = msgspec.structs.replace(own.state, num_forwards=1)
    first, second, again = Worker(golden_model).run(burst([own] * 3, [own.state, later, later], 1)).states
    assert first.tokens != second.tokens
    assert second.tokens == again.tokens
