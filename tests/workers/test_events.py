"""Traces, log-probabilities and removed tokens: the exact history of a canvas."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from step_cases import logits_of

from remask import (
    CappedThreshold,
    Dream,
    LowProb,
    OracleLoo,
    RandomRemask,
    Rcr,
    Remdm,
    Saber,
    SamplingParams,
    Threshold,
    Wino,
)
from remask.scheduler.canvas import EVENT, REAL, TOKEN, Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import resolve
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Worker

PROMPT = [33, 11, 12, 14]
POLICIES: tuple[dict[str, Any], ...] = (
    {"unmask": CappedThreshold(0.05), "remask": Wino(0.9)},
    {"unmask": Threshold(0.05), "remask": LowProb(0.6, max_times=3, post_steps=4)},
    {"remask": Saber(4, 2)},
    {"unmask": "schedule:8", "remask": Rcr()},
    {"remask": Remdm(20, "rescale", 0.5)},
    {"unmask": Dream(9)},
)


def canvas(seed: int = 5, **fields: Any) -> Canvas:
    params = resolve(SamplingParams(**{"max_tokens": 24, "temperature": 2.0, "rank": "top", **fields}))
    return new_canvas("r", 0, PROMPT, params, seed=seed, sample=0, mask_id=0, stop_ids=[])


class Finished(NamedTuple):
    """Finished canvases, the EVENT records of each, and the bytes of each result on the wire."""

    states: list[CanvasState]
    events: list[bytes]
    wire_lens: list[int]


def finish(model: TransformerDenoiser, canvases: list[Canvas], num_steps: int) -> Finished:
    """Runs every burst from its encoded message on a new worker, so that no worker keeps state."""
    states: list[CanvasState | int] = [c.state for c in canvases]
    events, wire_lens = [b""] * len(canvases), []
    while True:
        batch = StepBatch(burst_id=0, num_steps=num_steps, specs=[c.spec for c in canvases], states=states)
        wire = msgspec.msgpack.encode(batch)
        result = Worker(model).run(msgspec.msgpack.decode(wire, type=StepBatch))
        wire = msgspec.msgpack.encode(result)
        wire_lens.append(len(wire))
        result = msgspec.msgpack.decode(wire, type=StepResult)
        events = [own + result.events.get(place, b"") for place, own in enumerate(events)]
        if all(state.finished for state in result.states):
            return Finished(result.states, events, wire_lens)
        states = list(result.states)


def one_step(model: TransformerDenoiser, own: Canvas, state: CanvasState) -> StepResult:
    return Worker(model).run(StepBatch(burst_id=0, num_steps=1, specs=[own.spec], states=[state]))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_events_are_all_that_happened(golden_model: TransformerDenoiser, policy: dict) -> None:
    own, silent = canvas(trace=True, **policy), canvas(**policy)
    found = finish(golden_model, [own, silent], 3)
    state, untraced = found.states
    assert found.events[1] == b""
    assert untraced.tokens == state.tokens
    events = np.frombuffer(found.events[0], EVENT)
    assert (np.diff(events["step"] * 24 + events["slot"]) > 0).all(), "by step, then by slot"
    tokens, commit_steps, confidences = np.zeros(24, TOKEN), np.zeros(24, TOKEN), np.zeros(24, REAL)
    for event in events:
        slot = event["slot"]
        if event["is_commit"]:
            assert tokens[slot] == 0
            tokens[slot], commit_steps[slot] = event["token"], event["step"]
            confidences[slot] = event["confidence"]
        else:
            assert tokens[slot] == event["token"] != 0, "the event has the removed token"
            assert 0 <= event["confidence"] <= 1
            tokens[slot] = 0
    assert tokens.tolist() == state.token_array()[4:].tolist()
    assert commit_steps.tobytes() == state.commit_steps
    assert confidences.tobytes() == state.confidences
    has_remasks = not events["is_commit"].all()
    assert has_remasks == (policy.get("remask") is not None), "the cases are meant to remask"
    assert finish(golden_model, [own, silent], 1000).events == found.events


def test_a_result_carries_the_events_of_its_own_burst_only(golden_model: TransformerDenoiser) -> None:
    """One commit a burst: what a trace adds to a result stays the same however long the trace is."""
    traced, silent = (
        finish(golden_model, [canvas(unmask="schedule", trace=trace)], 1).wire_lens for trace in (True, False)
    )
    more = {with_events - without for with_events, without in zip(traced, silent, strict=True)}
    assert len(traced) == 24
    assert max(more) <= EVENT.itemsize + 8, "an event, its place and its length"


def test_a_burst_that_follows_another_reports_only_its_own_events(
    golden_model: TransformerDenoiser,
) -> None:
    own, worker = canvas(unmask="schedule", trace=True), Worker(golden_model)
    sent = StepBatch(burst_id=0, num_steps=4, specs=[own.spec], states=[own.state])
    results = [worker.run(sent)]
    for burst in range(1, 6):
        follows = StepBatch(burst_id=burst, num_steps=4, follows=burst - 1, specs=[own.spec], states=[0])
        results.append(worker.run(follows))
    records = [np.frombuffer(result.events[0], EVENT) for result in results]
    assert [own["step"].tolist() for own in records] == [[*range(n, n + 4)] for n in range(1, 25, 4)]


@pytest.mark.parametrize(
    ("policy", "signal"),
    [
        ({"unmask": CappedThreshold(0.05), "remask": Wino(0.7)}, 0.7),
        ({"unmask": "schedule:6", "remask": LowProb(0.6, max_times=3)}, 0.6),
    ],
    ids=str,
)
def test_a_remask_event_reports_the_probability_that_caused_it(
    golden_model: TransformerDenoiser, policy: dict, signal: float
) -> None:
    (records,) = finish(golden_model, [canvas(trace=True, **policy)], 8).events
    events = np.frombuffer(records, EVENT)
    doubts = events["confidence"][events["is_commit"] == 0]
    assert len(doubts) > 0
    assert (doubts < signal).all()


@torch.inference_mode()
@pytest.mark.parametrize("policy", [*POLICIES, {"unmask": Threshold(0.4), "top_p": 0.5}], ids=str)
def test_log_probabilities_are_those_of_the_untempered_softmax_at_the_commit(
    golden_model: TransformerDenoiser, policy: dict
) -> None:
    own = canvas(**policy)
    state = own.state
    while not state.finished:
        expected = logits_of(golden_model, state.token_array()).double().log_softmax(-1)[4:]
        (state,) = one_step(golden_model, own, state).states
        now = np.frombuffer(state.commit_steps, TOKEN) == state.num_forwards
        found, tokens = np.frombuffer(state.logprobs, REAL), state.token_array()[4:]
        for slot in now.nonzero()[0]:
            assert found[slot] == pytest.approx(float(expected[slot, tokens[slot]]), rel=1e-4, abs=1e-5)
        assert (found[tokens == 0] == 0).all()


@pytest.mark.parametrize(
    ("unmask", "remask"),
    [
        (CappedThreshold(0.05), Wino(0.95)),
        (CappedThreshold(0.05), Wino(0.95, budget="cur_accept", tile="self")),
        ("schedule:6", LowProb(0.9, max_times=5, max_share=0.5)),
        (CappedThreshold(0.05), RandomRemask(t2=0.95)),
    ],
    ids=str,
)
def test_a_banned_token_does_not_come_back_to_its_position_in_the_block(
    golden_model: TransformerDenoiser, unmask: Any, remask: Any
) -> None:
    banning = msgspec.structs.replace(remask, ban_old=True)
    fields = {"unmask": unmask, "trace": True, "block_length": 12, "temperature": 0.7}
    canvases = [canvas(seed, remask=policy, **fields) for seed in range(3) for policy in (remask, banning)]
    found = finish(golden_model, [*canvases, canvas(unmask="schedule:3")], 1000)
    *states, other = found.states
    freely, banned = states[::2], states[1::2]
    assert sum(map(num_returns, found.events[:-1:2])) > 0, "the cases are meant to show the difference"
    assert sum(map(num_returns, found.events[1::2])) == 0
    again = finish(golden_model, canvases[1::2], 1).states
    assert [state.tokens for state in again] == [state.tokens for state in banned]
    assert {state.removed for state in (other, *freely)} == {b""}


def num_returns(records: bytes) -> int:
    """Commits of a token that the slot has lost before."""
    removed, count = set[tuple[int, int]](), 0
    for event in np.frombuffer(records, EVENT):
        key = (int(event["slot"]), int(event["token"]))
        if not event["is_commit"]:
            removed.add(key)
        count += bool(event["is_commit"]) and key in removed
    return count


def test_a_slot_that_has_lost_every_token_it_may_hold_takes_them_again(
    golden_model: TransformerDenoiser,
) -> None:
    fields = {"remask": LowProb(1.0, max_times=4, ban_old=True), "allowed_token_ids": [20, 21], "trace": True}
    (state,), (records,), _ = finish(golden_model, [canvas(unmask="schedule:6", **fields)], 4)
    tokens = state.token_array()[4:]
    assert set(tokens.tolist()) <= {20, 21}
    events = np.frombuffer(records, EVENT)
    assert np.bincount(events["slot"][events["is_commit"] == 0]).max() > 2, (
        "the case is meant to exhaust them"
    )


@torch.inference_mode()
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_trace_tells_which_commits_are_of_the_most_probable_token(
    golden_model: TransformerDenoiser, temperature: float
) -> None:
    own = canvas(unmask="schedule:6", temperature=temperature, trace=True)
    state, found = own.state, []
    while not state.finished:
        logits = logits_of(golden_model, state.token_array())
        logits[:, golden_model.mask_id] = -torch.inf
        top = logits.argmax(-1)[4:]
        result = one_step(golden_model, own, state)
        (state,) = result.states
        for event in np.frombuffer(result.events[0], EVENT):
            found.append(bool(event["is_top"]))
            assert found[-1] == (event["token"] == int(top[event["slot"]]))
    assert all(found) == (temperature == 0)


@pytest.mark.parametrize(
    ("policy", "per_slot", "per_commit"),
    [
        ({"unmask": Threshold(0.4)}, 0, 0),
        ({"unmask": Threshold(0.4), "cfg_scale": 1.0}, 0, 0),
        ({"unmask": CappedThreshold(0.05), "remask": Wino(0.7)}, 1, 0),
        ({"unmask": CappedThreshold(0.05), "remask": OracleLoo(0.7)}, 0, 28),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_query_rows_are_those_of_every_forward(
    golden_model: TransformerDenoiser, policy: dict, per_slot: int, per_commit: int, num_steps: int
) -> None:
    """The last block is shorter than the others."""
    own = canvas(block_length=10, **policy)
    other = canvas(1, unmask="schedule:6")
    expected, state = 0, own.state
    while not state.finished:
        first = 4 + 10 * state.block
        block = state.token_array()[first : first + 10]
        num_committed = int((block != golden_model.mask_id).sum())
        expected += 28 * (1 + own.spec.is_guided) + per_slot * len(block) + per_commit * num_committed
        (state,) = one_step(golden_model, own, state).states
        assert state.num_query_rows == expected
    whole, _ = finish(golden_model, [own, other], num_steps).states
    assert whole.num_query_rows == expected
