"""Canvases that go from one burst to another on the device hold there what the host would have sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remask import SamplingParams
from remask.scheduler.canvas import REAL, Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.burst.graphs import Graph, StepGraphs
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Launched, Worker

POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.4"},
    {"unmask": "schedule:score=random", "temperature": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"},
    {"unmask": "threshold:0.3", "remask": "low_prob:0.6,max_times=2,post_steps=3"},
    {"remask": "saber:3,2"},
    {"unmask": "schedule:steps=9", "remask": "rcr"},
    {"remask": "remdm:10,cap,0.3", "temperature": 1.0},
    {"unmask": "threshold:0.3", "stop": ["x"]},
    {"unmask": "threshold:0.3", "trace": True},
    {"unmask": "capped_threshold:0.2", "remask": "wino:t2=0.95,ban_old=true"},
]


def make(policy: int, canvas_len: int, block_length: int) -> Canvas:
    params = resolve(
        SamplingParams(max_tokens=canvas_len, block_length=min(block_length, canvas_len), **POLICIES[policy])
    )
    return new_canvas("r", 0, [33, 11, 12], params, seed=policy, sample=0, mask_id=0, stop_ids=[])


class Again:
    """Stands in for a CUDA graph: takes the step that was captured on the same tensors."""

    def __init__(self, step: Callable[[], int]) -> None:
        self.replay = step


def capture(step: Callable[[], int]) -> tuple[Graph, int, int]:
    return Again(step), 0, 1


canvases = st.builds(
    make, st.sampled_from(range(len(POLICIES))), st.integers(4, 14), st.sampled_from([3, 4, 8])
)


@pytest.fixture(scope="module")
def model(golden_model: TransformerDenoiser, dense_attention: AttentionBackend) -> TransformerDenoiser:
    return TransformerDenoiser(golden_model.model, dense_attention, pack_rows=1 << 30, static_shapes=True)


@pytest.mark.slow
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    own=st.lists(canvases, min_size=2, max_size=4),
    new=st.lists(canvases, max_size=2),
    first_steps=st.integers(1, 4),
    then=st.integers(1, 4),
    with_graphs=st.booleans(),
    data=st.data(),
)
def test_a_burst_of_some_canvases_and_new_ones_equals_sending_them(
    model: TransformerDenoiser,
    own: list[Canvas],
    new: list[Canvas],
    first_steps: int,
    then: int,
    with_graphs: bool,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.permutations(range(len(own))))[: data.draw(st.integers(1, len(own)))]
    places: list[int] = data.draw(st.permutations(range(len(kept) + len(new))))
    first = StepBatch(
        burst_id=0, num_steps=first_steps, specs=[c.spec for c in own], states=[c.state for c in own]
    )

    def following(states: list[CanvasState | int], follows: int | None) -> StepBatch:
        entries = [*zip((own[k].spec for k in kept), states, strict=True), *((c.spec, c.state) for c in new)]
        specs, sent = zip(*(entries[place] for place in places), strict=True)
        return StepBatch(burst_id=1, num_steps=then, follows=follows, specs=[*specs], states=[*sent])

    def worker() -> Worker:
        graphs = StepGraphs(model.device, capture) if with_graphs else None
        made = Worker(model, graphs)
        for _ in range(2 * with_graphs):  # captured in the second
            made.run(first)
        return made

    states = worker().run(first).states
    expected = worker().run(following([states[k] for k in kept], None))
    carrying = worker()
    carrying.run(first)
    found = carrying.run(following(list(kept), 0))
    # Confidences may round differently, see below.
    assert {c: len(r) for c, r in found.events.items()} == {c: len(r) for c, r in expected.events.items()}
    for one, other in zip(found.states, expected.states, strict=True):
        for name in ("tokens", "commit_steps", "num_forwards", "block", "finished", "removed"):
            assert getattr(one, name) == getattr(other, name), name
        # A canvas that has ended is in the pack if the host does not know it yet; that rounds differently.
        for name in ("confidences", "logprobs", "memory"):
            numbers = [np.frombuffer(getattr(state, name), REAL) for state in (one, other)]
            np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-5)


def test_two_kinds_of_policy_with_one_kernel_keep_their_memory_apart(model: TransformerDenoiser) -> None:
    """`wino` and `oracle_loo` decide alike, from other probabilities."""
    own = [
        new_canvas("r", i, [33, 11, 12], resolve(params), seed=i, sample=0, mask_id=0, stop_ids=[])
        for i, params in enumerate(
            {"max_tokens": 12, "unmask": f"capped_threshold:{t}", "remask": remask}
            for t, remask in ((0.01, "wino"), (1.0, "oracle_loo"))
        )
    ]
    first = StepBatch(burst_id=0, num_steps=1, specs=[c.spec for c in own], states=[c.state for c in own])
    for canvas, num_committed in enumerate((8.0, 1.0)):
        worker = Worker(model)
        worker.run(first)
        follows = StepBatch(burst_id=1, num_steps=0, follows=0, specs=[own[canvas].spec], states=[canvas])
        (found,) = worker.run(follows).states
        assert np.frombuffer(found.memory, REAL).tolist() == [num_committed]


def test_the_host_does_not_wait_for_a_burst_whose_canvases_it_goes_on_with(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [make(i, 14, 4) for i in (0, 2, 4)]
    waits: list[int] = []
    wait = Launched.wait
    worker = Worker(model)
    first = StepBatch(burst_id=0, num_steps=2, specs=[c.spec for c in own], states=[c.state for c in own])
    worker.launch(first)

    def counted(self: Launched) -> list[CanvasState]:
        waits.append(self.burst_id)
        return wait(self)

    monkeypatch.setattr(Launched, "wait", counted)
    worker.launch(msgspec.structs.replace(first, burst_id=1, follows=0, specs=first.specs[1:], states=[1, 2]))
    assert waits[0] == 1, "a CPU waits for the burst that it launches"
