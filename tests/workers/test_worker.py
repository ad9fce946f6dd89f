"""A worker that keeps the canvases of its last burst gives the results that it gives for their bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remask import SamplingParams, Threshold
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import resolve
from remask.workers import steps
from remask.workers import worker as module
from remask.workers.burst.enqueue import StepQueue
from remask.workers.burst.state import BurstState
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.startup.device import on_device
from remask.workers.step import denoise, plan_packs
from remask.workers.worker import Launched, Worker

POLICIES = [
    {"unmask": "threshold:0.4"},
    {"unmask": "schedule:score=random", "temperature": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"},
]


def make(policy: int, canvas_len: int, stop: str | None = None) -> Canvas:
    params = resolve(SamplingParams(max_tokens=canvas_len, block_length=4, stop=stop, **POLICIES[policy]))
    return new_canvas("r", 0, [33, 11, 12], params, seed=policy, sample=0, mask_id=0, stop_ids=[])


def first_burst(canvases: list[Canvas], num_steps: int) -> StepBatch:
    return StepBatch(
        burst_id=0,
        num_steps=num_steps,
        specs=[canvas.spec for canvas in canvases],
        states=[canvas.state for canvas in canvases],
    )


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.integers(4, 14), min_size=2, max_size=3),
    first_steps=st.integers(1, 6),
    then=st.integers(1, 6),
    kept=st.permutations([0, 1]),
    joins=st.booleans(),
)
def test_following_a_burst_equals_sending_the_canvases(
    golden_model: TransformerDenoiser,
    lens: list[int],
    first_steps: int,
    then: int,
    kept: list[int],
    joins: bool,
) -> None:
    canvases = [make(i % 3, n) for i, n in enumerate(lens)]
    worker = Worker(golden_model)
    result = worker.run(first_burst(canvases, first_steps))
    places: list[CanvasState | int] = [*kept] if joins else [*range(len(lens))]
    specs = [canvases[place].spec for place in places if isinstance(place, int)]
    new = make(2, 9)
    following = StepBatch(
        burst_id=1,
        num_steps=then,
        follows=0,
        specs=specs + [new.spec] * joins,
        states=places + [new.state] * joins,
    )
    sent = msgspec.structs.replace(
        following,
        follows=None,
        states=[result.states[state] if isinstance(state, int) else state for state in following.states],
    )
    assert worker.run(following).states == Worker(golden_model).run(sent).states


def test_what_is_derived_from_a_canvas_is_derived_once_while_it_stays(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Specs are decoded from every message anew, as on Ray."""
    asked: list[list[int]] = []
    monkeypatch.setattr(Threshold, "block_params", lambda self, lens: asked.append([*lens]) or {})
    worker, lens = Worker(golden_model), [4, 8, 12]
    batch = first_burst([make(0, n) for n in lens], 1)
    for burst_id in range(3):
        worker.run(msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=StepBatch))
        joined = make(0, 16 + burst_id)
        batch = StepBatch(
            burst_id=burst_id + 1,
            num_steps=1,
            follows=burst_id,
            specs=[*batch.specs[:2], joined.spec],
            states=[0, 1, joined.state],
        )
    blocks = [[4] * (n // 4) + [n % 4] * (n % 4 > 0) for n in (*lens, 16, 17)]
    assert asked == blocks


def test_an_interrupted_burst_that_follows_another_can_be_run_again(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases = [make(0, 12), make(2, 12)]
    worker, other = Worker(golden_model), Worker(golden_model)
    following = StepBatch(burst_id=1, num_steps=3, follows=0, specs=[c.spec for c in canvases], states=[0, 1])
    for each in (worker, other):
        each.run(first_burst(canvases, 1))
    expected = other.run(following).states
    answers = TransformerDenoiser.statistics
    calls = iter([True, False])

    def interrupted(self: TransformerDenoiser, *args: object) -> object:
        if next(calls):
            return answers(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformerDenoiser, "statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.run(following)
    monkeypatch.undo()
    assert worker.run(following).states == expected


def test_the_seconds_of_a_burst_begin_when_the_one_before_it_has_ended(
    golden_model: TransformerDenoiser,
) -> None:
    worker, state = Worker(golden_model), BurstState([make(0, 4).spec], [make(0, 4).state])
    steps = StepQueue(lambda: 0, 0, state.paused)
    first, second = (
        Launched(i, started, 1, state, steps, states=[], ended=ended)
        for i, (started, ended) in enumerate([(10.0, 12.0), (11.0, 15.0)])
    )
    assert [worker.collect(burst).seconds for burst in (first, second)] == [2.0, 3.0]


def test_a_burst_ends_where_a_canvas_pauses_for_a_look_at_its_text(
    golden_model: TransformerDenoiser,
) -> None:
    canvases = [make(1, 12, stop="x"), make(1, 14)]
    worker = Worker(golden_model)
    paused, other = worker.run(first_burst(canvases, 100)).states
    assert (paused.block, paused.num_forwards, paused.finished) == (1, 4, False)
    assert other.num_forwards == 4
    following = StepBatch(burst_id=1, num_steps=3, follows=0, specs=[c.spec for c in canvases], states=[0, 1])
    paused, other = worker.run(following).states
    assert (paused.block, paused.num_forwards, other.num_forwards) == (1, 7, 7)


def test_a_paused_canvas_does_not_change_while_others_go_on(golden_model: TransformerDenoiser) -> None:
    canvases = [make(2, 12, stop="x"), make(2, 40)]
    (alone,) = Worker(golden_model).run(first_burst(canvases[:1], 100)).states
    assert alone.block == 1
    state = BurstState([c.spec for c in canvases], [c.state for c in canvases])
    for _ in range(alone.num_forwards + 3):
        denoise(state, plan_packs(state, golden_model, golden_model.pack_rows), golden_model)
    paused, other = state.to_states()
    assert other.num_forwards > alone.num_forwards
    assert (paused.tokens, paused.num_forwards, paused.block) == (
        alone.tokens,
        alone.num_forwards,
        alone.block,
    )
    assert paused.commit_steps == alone.commit_steps
    # A pack of other shape rounds differently.
    for one, other_one in ((paused.confidences, alone.confidences), (paused.memory, alone.memory)):
        numbers = (torch.frombuffer(bytearray(part), dtype=torch.float32) for part in (one, other_one))
        torch.testing.assert_close(*numbers, rtol=1e-5, atol=1e-6)


def test_a_burst_that_does_not_fit_is_reported_and_what_follows_it_is_skipped(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, batch = Worker(golden_model), first_burst([make(0, 12)], 2)
    after = msgspec.structs.replace(batch, burst_id=1, follows=0, states=[0])
    with monkeypatch.context() as scarce:
        scarce.setattr(golden_model.model, "forward", lambda *_: torch.empty(1 << 60))
        failed = worker.run(batch)
    assert (failed.failure, failed.states, failed.burst_id) == ("memory", [], 0)
    assert worker.run(after).failure == "skipped"
    assert worker.run(msgspec.structs.replace(after, burst_id=2, follows=1)).failure == "skipped"
    assert worker.run(batch).failure is None, "and it goes on"
    assert (
        worker.run(after).states
        == Worker(golden_model).run(msgspec.structs.replace(batch, num_steps=4)).states
    )


def test_an_error_is_reported_and_what_follows_it_is_skipped(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, batch = Worker(golden_model), first_burst([make(0, 12)], 2)
    with monkeypatch.context() as broken:
        broken.setattr(golden_model.model, "forward", lambda *_: 1 / 0)
        failed = worker.run(batch)
    assert (failed.failure, failed.states) == ("error", [])
    assert failed.error == "ZeroDivisionError: division by zero"
    after = msgspec.structs.replace(batch, burst_id=1, follows=0, states=[0])
    assert worker.run(after).failure == "skipped"
    assert worker.run(batch).failure is None, "and it goes on"


class Mute(RuntimeError):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "message"),
    [(Mute(), "Mute: "), (OSError("half: \ud800"), "OSError: half: ?")],
    ids=["raises", "not UTF-8"],
)
def test_an_error_without_usable_text_is_reported(
    golden_model: TransformerDenoiser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    message: str,
) -> None:
    caplog.set_level(logging.CRITICAL, logger="remask")  # pytest-xdist reports no text that is not UTF-8

    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(golden_model.model, "forward", forward)
    result = Worker(golden_model).run(first_burst([make(0, 12)], 2))
    assert (result.failure, result.error) == ("error", message)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=repr,
)
def test_errors_that_end_the_process_or_lose_the_gpu_are_raised(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(golden_model.model, "forward", forward)
    with pytest.raises(type(error)):
        Worker(golden_model).run(first_burst([make(0, 12)], 2))


def test_all_work_runs_with_the_models_device_as_the_current_one(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton, graphs and events use the thread's current GPU, and `cuda:1` is not it by itself."""
    entered: list[torch.device] = []
    inside: list[bool] = []

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def noted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            inside.append(entered[-1:] == [golden_model.device])
            return function(*args)

        return call

    monkeypatch.setattr(module, "on_device", recorded)
    for owner, name in ((steps, "denoise"), (module, "Fetched"), (module, "BurstState")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    Worker(golden_model).run(first_burst([make(0, 8)], 2))
    assert len(inside) >= 3
    assert all(inside)


def test_the_current_device_is_a_gpus_own() -> None:
    assert isinstance(on_device(torch.device("cuda:1")), torch.cuda.device)
    with on_device(torch.device("cpu")):
        pass
