"""The denoising step on the golden model: bounds, identities, and shadow rows that nobody else sees."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
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
from remask.scheduler.canvas import EVENT, REAL, TOKEN, Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.scheduler.policies.base import share_steps
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.burst import BurstState
from remask.workers.keyed_random import stream_keys
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.rows import HeadQuery, PackedRows, StepInputs
from remask.workers.step import plan_packs
from remask.workers.worker import Worker

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
PROMPT = [33, 11, 12, 14]


def canvas(params: SamplingParams, prompt: list[int] = PROMPT, seed: int = 5) -> Canvas:
    return new_canvas("r", 0, prompt, resolve(params), seed=seed, sample=0, mask_id=0, stop_ids=[])


def burst(canvases: list[Canvas], states: list[CanvasState], num_steps: int) -> StepBatch:
    return StepBatch(burst_id=0, num_steps=num_steps, specs=[c.spec for c in canvases], states=states)


def finish(model: TransformerDenoiser, canvases: list[Canvas], num_steps: int = 1000) -> list[CanvasState]:
    states = [c.state for c in canvases]
    while not all(state.finished for state in states):
        live = [i for i, state in enumerate(states) if not state.finished]
        result = Worker(model).run(burst([canvases[i] for i in live], [states[i] for i in live], num_steps))
        for i, state in zip(live, result.states, strict=True):
            states[i] = state
    return states


POLICIES = (
    {"unmask": Schedule()},
    {"unmask": Schedule(9, "random")},
    {"unmask": Schedule(12, "margin")},
    {"unmask": Threshold(0.6)},
    {"unmask": Factor(1.0)},
    {"unmask": CappedThreshold(0.5)},
    {"unmask": CappedThreshold(0.3), "remask": Wino(0.9)},
    {"unmask": Threshold(0.4), "remask": Wino(0.95, budget="cur_accept")},
    {"unmask": Schedule(6), "remask": Wino(0.9)},
    {"unmask": CappedThreshold(0.3), "remask": Wino(0.9, tile="self")},
    {"unmask": EntropyBound(1.0)},
    {"unmask": Bernoulli(2.0)},
    {"unmask": Threshold(0.3), "remask": LowProb(0.6, max_times=2, post_steps=3)},
    {"remask": Saber(3, 2)},
    {"unmask": CappedThreshold(0.3), "remask": RandomRemask(t2=0.95)},
    {"unmask": Threshold(0.3), "remask": RandomRemask("low_prob", t=0.6)},
    {"unmask": Dream(), "block_length": None},
    {"unmask": Dream(12, "origin"), "block_length": None},
    {"unmask": Dream(7, "maskgit_plus", alg_temp=0.3), "block_length": None, "top_p": 0.9},
    {"unmask": Schedule(9), "remask": Rcr()},
    {"unmask": Schedule(14), "remask": Rcr("margin"), "top_k": 5},
    {"remask": Remdm(10, "cap", 0.3)},
    {"remask": Remdm(schedule="conf")},
    {"unmask": CappedThreshold(0.3), "remask": OracleLoo(0.9)},
    {"unmask": CappedThreshold(0.2), "remask": Wino(0.95, ban_old=True)},
    {"unmask": Threshold(0.2), "remask": LowProb(0.7, max_times=3, ban_old=True)},
)

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
        events = np.frombuffer(state.events, EVENT)
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
def test_company_and_bursts_change_no_token(
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


def after(model: TransformerDenoiser, own: Canvas, num_steps: int) -> CanvasState:
    (state,) = Worker(model).run(burst([own], [own.state], num_steps)).states
    return state


def packed(
    model: TransformerDenoiser, canvases: list[Canvas], states: list[CanvasState]
) -> tuple[PackedRows, HeadQuery]:
    state = BurstState([c.spec for c in canvases], states)
    (plan,) = plan_packs(state, model, model.pack_rows)
    slots, valid = state.active_slots()
    step = StepInputs(
        tokens=state.tokens,
        blocks=state.active_blocks(slots, valid, model.mask_id),
        mask_id=model.mask_id,
        sampling=state.sampling,
        keys=stream_keys(state.keys.unsqueeze(1), slots),
        needs=frozenset(),
        removed=state.removed,
    )
    return plan.pack(step)


@torch.inference_mode()
def test_shadow_rows_change_no_logit_of_a_main_row(golden_model: TransformerDenoiser) -> None:
    params = {"max_tokens": 24, "block_length": 24, "unmask": CappedThreshold(0.3)}
    plain, verifying = (canvas(SamplingParams(**params, remask=remask)) for remask in (None, Wino()))
    state = after(golden_model, plain, 2)
    without, _ = packed(golden_model, [plain], [state])
    with_shadows, _ = packed(
        golden_model, [verifying], [msgspec.structs.replace(state, memory=verifying.state.memory)]
    )
    assert len(with_shadows.ids_T) == len(without.ids_T) + 24
    a, b = (golden_model.model(rows, golden_model.attention) for rows in (without, with_shadows))
    assert len(b) > len(a) > 0
    torch.testing.assert_close(b[: len(a)], a, rtol=1e-4, atol=1e-4)


def test_packs_hold_no_padding_whatever_the_block_lengths(golden_model: TransformerDenoiser) -> None:
    long = canvas(SamplingParams(max_tokens=64, block_length=64))
    short = canvas(SamplingParams(max_tokens=20, block_length=8, unmask=Schedule(), remask=Wino()))
    rows, query = packed(golden_model, [long, short], [long.state, after(golden_model, short, 3)])
    assert len(rows.ids_T) == long.num_rows + short.num_rows == (4 + 64) + (4 + 20 + 8)
    assert len(query.given) == len(rows.candidates_H) == 64 + 5 + 3
    assert rows.num_main_slots == 64 + 5


def test_candidates_are_masked_slots_and_shadow_rows_of_committed_ones(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    state = after(golden_model, own, 11)  # three of the second block
    rows, query = packed(golden_model, [own], [state])
    masked = rows.ids_T[12:20] == 0
    assert int(masked.sum()) == 5
    assert rows.candidates_H.tolist() == [
        *(12 + masked.nonzero().squeeze(1)).tolist(),
        *(20 + (~masked).nonzero().squeeze(1)).tolist(),
    ]
    assert query.given[5:].tolist() == rows.ids_T[12:20][~masked].tolist()
    (whole,), (read,) = rows.layout.shadows, rows.candidate_layout.shadows
    assert (whole.queries, whole.keys, read.queries, read.keys) == ((0, 8), (0, 8), (0, 3), (0, 8))
    assert torch.equal(read.mask, whole.mask[~masked])


def test_there_are_no_shadow_rows_while_nothing_of_the_block_is_committed(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    other = canvas(SamplingParams(max_tokens=16, block_length=4, unmask=Schedule(), remask=Wino()))
    rows, _ = packed(golden_model, [own, other], [after(golden_model, own, 8), after(golden_model, other, 1)])
    assert len(rows.ids_T) == 2 * (4 + 16) + 4
    assert [shadow.sequence for shadow in rows.layout.shadows] == [1]


def test_a_shadow_row_stands_at_its_slot_and_sees_all_but_it(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=12, block_length=5, unmask=Schedule(), remask=Wino()))
    state = after(golden_model, own, 11)  # the last block is shorter: two slots, one of them committed
    assert state.block == 2
    rows, _ = packed(golden_model, [own], [state])
    assert rows.ids_T[16:].tolist() == [0, 0]
    assert rows.positions_T[16:].tolist() == [14, 15]
    mask = rows.layout.shadows[0].mask
    for j, hole in enumerate((14, 15)):
        assert (~mask[j]).nonzero().squeeze(1).tolist() == [hole]


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


@torch.inference_mode()
def test_a_policy_that_asks_for_committed_rows_gets_their_own_probabilities(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=LowProb()))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    states = [after(golden_model, own, 11), after(golden_model, other, 3)]
    rows, query = packed(golden_model, [own, other], states)
    assert rows.candidates_H[:8].tolist() == list(range(12, 20)), "the whole block, masked or not"
    assert len(rows.candidates_H) == 8 + 5 + 3
    found = golden_model.statistics(rows, query)
    hidden = golden_model.model(rows, golden_model.attention)
    p = golden_model.model.logits(hidden[:8]).float().softmax(-1)
    tokens = torch.from_numpy(states[0].token_array()[12:20].astype(np.int64))
    torch.testing.assert_close(found.log_given.exp()[:8], p.gather(1, tokens.unsqueeze(1)).squeeze(1))


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


def test_shadow_rows_that_see_only_themselves_stand_for_committed_slots_alone(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino(tile="self")))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    rows, _ = packed(golden_model, [own, other], [after(golden_model, c, 3) for c in (own, other)])
    assert len(rows.ids_T) == 2 * 20 + 3 + 8
    small, whole = rows.layout.shadows
    assert torch.equal(small.mask[:, 20:], torch.eye(3, dtype=torch.bool))
    assert whole.mask[:, 20:].all()
    assert (small.mask[:, :20].sum(1) == 19).all()


@torch.inference_mode()
def test_in_one_layer_a_lone_shadow_row_is_the_exact_leave_one_out(tmp_path: Path) -> None:
    config = json.loads((MODELS / "llada-124m" / "config.json").read_text())
    config |= {"d_model": 64, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 96}
    config |= {"vocab_size": 200, "embedding_size": 200, "mask_token_id": 0, "eos_token_id": 1}
    config.pop("eot_token_id", None)
    config.pop("pad_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_denoiser(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    model.model.head.mul_(0.1)  # so that probabilities are neither 0 nor 1
    errors = {}
    for tile in ("self", "all"):
        own = canvas(
            SamplingParams(max_tokens=12, block_length=8, unmask=Schedule(), remask=Wino(0, tile=tile))
        )
        state = after(model, own, 5)
        rows, query = packed(model, [own], [state])
        found = model.statistics(rows, query)
        tokens = torch.from_numpy(state.token_array().astype(np.int64))
        errors[tile] = 0.0
        committed = [slot for slot in range(8) if tokens[4 + slot] != 0]
        for place, slot in enumerate(committed, start=rows.num_main_slots):
            hole = tokens.clone()
            hole[4 + slot] = 0
            every, bounds = torch.arange(16), (0, 16)
            layout = VarlenLayout(bounds, bounds, ())
            alone = PackedRows(hole, every, layout, every, layout, every, 16)
            p = model.model.logits(model.model(alone, model.attention))[4 + slot].softmax(-1)
            difference = float(found.log_given.exp()[place] - p[tokens[4 + slot]])
            errors[tile] = max(errors[tile], abs(difference))
        assert len(committed) == 5
    assert errors["self"] < 1e-5
    assert errors["all"] > 1e-3, "there is a difference to see"


def test_a_later_forward_draws_other_tokens_from_the_same_canvas(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=32, temperature=5.0, rank="top", unmask=Schedule(1)))
    later = msgspec.structs.replace(own.state, num_forwards=1)
    first, second, again = Worker(golden_model).run(burst([own] * 3, [own.state, later, later], 1)).states
    assert first.tokens != second.tokens
    assert second.tokens == again.tokens


@torch.inference_mode()
def test_the_oracle_asks_once_for_each_committed_token_without_it(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=OracleLoo()))
    guided = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), cfg_scale=1.0))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    canvases = [guided, own, other]
    states = [after(golden_model, each, 11) for each in canvases]
    assert own.num_rows == 20 * 9
    rows, query = packed(golden_model, canvases, states)
    assert len(rows.ids_T) == 40 + 20 + 20 + 3 * 20 + 8
    assert len(rows.slots_N) == 5 + 5 + 5 + 3 + 3
    found = golden_model.statistics(rows, query)
    tokens = torch.from_numpy(states[1].token_array().astype(np.int64))
    committed = [slot for slot in range(12, 20) if tokens[slot] != 0]
    assert len(committed) == 3
    every, bounds = torch.arange(20), (0, 20)
    layout = VarlenLayout(bounds, bounds, ())
    for place, slot in enumerate(committed, start=15):
        hole = tokens.clone()
        hole[slot] = 0
        alone = PackedRows(hole, every, layout, every, layout, every, 20)
        p = golden_model.model.logits(golden_model.model(alone, golden_model.attention))[slot].softmax(-1)
        assert float(found.log_given.exp()[place]) == pytest.approx(float(p[tokens[slot]]), rel=1e-4)
