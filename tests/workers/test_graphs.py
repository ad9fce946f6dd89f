"""Captured steps: the bursts that share one, and equal results of captured steps and the plain path.

A tape replaces CUDA: it records every operation of a step and repeats them on the same tensors. This shows
faults of a captured step, such as holding another burst's numbers or reading from the device on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tapes import Recorder

from remask import SamplingParams
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas, new_scored_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.burst import graphs as module
from remask.workers.burst.enqueue import AHEAD_STEPS
from remask.workers.burst.graphs import Graph, StepGraphs, capture_cuda
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.worker import Worker


@pytest.fixture
def model(golden_model: TransformerDenoiser, dense_attention: AttentionBackend) -> TransformerDenoiser:
    return TransformerDenoiser(golden_model.model, dense_attention, pack_rows=1 << 30, static_shapes=True)


def make(i: int, canvas_len: int, seed: int = 0, **fields: Any) -> Canvas:
    block = {} if "dream" in fields.get("unmask", "") else {"block_length": min(6, canvas_len)}
    params = resolve(SamplingParams(max_tokens=canvas_len, **block, **fields))
    prompt = [5 + i % 3, 11, 7, 9, 12][: 2 + i % 4]
    return new_canvas("r", i, prompt, params, seed=seed, sample=i, mask_id=0, stop_ids=[3])


def burst(canvases: list[Canvas], num_steps: int = 5, **fields: Any) -> StepBatch:
    states: list[CanvasState | int] = [c.state for c in canvases]
    return StepBatch(
        burst_id=0, num_steps=num_steps, specs=[c.spec for c in canvases], states=states, **fields
    )


def same(states: list[CanvasState], others: list[CanvasState]) -> None:
    """Equal but for the last bits of probabilities, which other shapes round differently."""
    assert len(states) == len(others)
    for one, other in zip(states, others, strict=True):
        for name in ("tokens", "commit_steps", "num_forwards", "block", "finished"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("confidences", "logprobs", "memory"):
            numbers = (
                torch.frombuffer(bytearray(getattr(s, name)), dtype=torch.float32)
                for s in (one, other)
                if getattr(s, name)
            )
            torch.testing.assert_close(*(tuple(numbers) or (0, 0)), rtol=1e-3, atol=1e-4)


MIXES: list[list[dict[str, Any]]] = [
    [{"unmask": "threshold:0.5"}],
    [{"unmask": "schedule:score=random", "temperature": 1.0}, {"unmask": "schedule:steps=9,score=margin"}],
    [{"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"}, {"unmask": "threshold:0.4"}],
    [{"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95,tile=self"}, {"remask": "saber:3,2"}],
    [{"unmask": "threshold:0.3", "remask": "low_prob:0.6,max_times=2,post_steps=3"}],
    [{"unmask": "bernoulli:2.0", "temperature": 0.5}, {"unmask": "entropy_bound:1.0"}],
    [{"remask": "remdm:10,cap,0.3", "temperature": 1.0}, {"unmask": "factor:1.0", "stop": ["x"]}],
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_one_graph_serves_other_canvases_and_writes_what_the_plain_path_writes(
    golden_model: TransformerDenoiser, model: TransformerDenoiser, mix: list[dict[str, Any]]
) -> None:
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    for i in range(4):
        canvases = [make(i + j, 14 - j, seed=i, **fields) for j, fields in enumerate(mix)]
        plain = Worker(golden_model).run(burst(canvases, 5))
        result = worker.run(burst(canvases, 5))
        # If a canvas pauses, the others continue with static shapes, but not on the plain path.
        if not any(fields.get("stop") for fields in mix):
            same(result.states, plain.states)
        assert result.num_rows >= plain.num_rows
    (tape,) = recorder.tapes
    assert tape.num_replays == 4 + 5 + 5, "the first burst runs plainly, the second takes one step so"


def test_a_graph_of_targets_serves_other_targets(
    golden_model: TransformerDenoiser, model: TransformerDenoiser
) -> None:
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    for i in range(3):
        tokens = np.array([5, 11, 7, 20 + i, 21, 22, 23 - i], dtype=np.int32)
        slots = np.array([3, 5, 6] if i % 2 else [3, 4, 6], dtype=np.int32)
        asked = [new_scored_canvas("r", 0, tokens, slots, seed=0, sample=0, mask_id=0)]
        same(worker.run(burst(asked)).states, Worker(golden_model).run(burst(asked)).states)
    assert len(recorder.tapes) == 1
    same(worker.run(burst([make(0, 7)])).states, Worker(golden_model).run(burst([make(0, 7)])).states)


REUSING: list[list[dict[str, Any]]] = [
    [{"unmask": "threshold:0.5", "reuse": "both"}],
    [{"unmask": "schedule", "reuse": "both"}, {"unmask": "schedule:9", "reuse": "prefix", "refresh": 3}],
    [{"unmask": "capped_threshold:0.3", "remask": "wino:0.95", "reuse": "both"}, {"unmask": "threshold:0.4"}],
    [{"unmask": "schedule:steps=9,score=margin"}, {"remask": "saber:3,2", "reuse": "prefix"}],
]


@pytest.mark.parametrize("mix", REUSING, ids=str)
def test_the_light_forwards_of_other_canvases_share_a_graph(
    golden_model: TransformerDenoiser, model: TransformerDenoiser, mix: list[dict[str, Any]]
) -> None:
    recorder, burst_id = Recorder(), 0
    worker = Worker(model, StepGraphs(model.device, recorder))
    for i in range(4):
        canvases = [make(i + j, 14 - j, seed=i, **fields) for j, fields in enumerate(mix)]
        states: list[Any] = [own.state for own in canvases]
        while not all(own.finished for own in states):
            burst_id += 1
            batch = msgspec.structs.replace(burst(canvases, 4), burst_id=burst_id, states=states)
            states = worker.run(batch).states
        for own, state in zip(canvases, states, strict=True):
            same([state], Worker(golden_model).run(burst([own], 99)).states)
    assert 0 < len(recorder.tapes) <= 2, "blocks of other sizes and canvases alone have other shapes"
    assert sum(tape.num_replays for tape in recorder.tapes) > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mix", [*MIXES, *REUSING], ids=str)
def test_cudas_graphs_write_what_the_same_kernels_write_one_by_one(
    golden_checkpoint: Path, mix: list[dict[str, Any]]
) -> None:
    model = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cuda")
    captured = []

    def capture(step: Callable[[], int]) -> tuple[Graph, int, int]:
        captured.append(capture_cuda(model.device)(step))
        return captured[-1]

    def never(step: Callable[[], int]) -> tuple[Graph, int, int]:
        raise torch.OutOfMemoryError("out of memory, says this test")

    graphs, plain = (Worker(model, StepGraphs(model.device, each)) for each in (capture, never))
    for i in range(4):
        canvases = [make(i + j, 14 - j, seed=i, **fields) for j, fields in enumerate(mix)]
        assert graphs.run(burst(canvases, 5)).states == plain.run(burst(canvases, 5)).states
    assert len(captured) == 1


def test_canvases_that_pause_stay_as_they_are_in_a_graph(model: TransformerDenoiser) -> None:
    canvases = [make(0, 12, unmask="threshold:0.1", stop=["x"]), make(1, 12, unmask="schedule")]
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    expected = Worker(model).run(burst(canvases, 5)).states
    assert expected[0].num_forwards < 5
    for _ in range(3):
        same(worker.run(burst(canvases, 5)).states, expected)
    assert recorder.tapes[0].num_replays == 9


def test_bursts_that_follow_each_other_go_on_in_the_graphs_memory(
    golden_model: TransformerDenoiser, model: TransformerDenoiser
) -> None:
    canvases = [make(0, 14, unmask="schedule"), make(1, 12, unmask="schedule", temperature=1.0)]
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    worker.run(burst(canvases, 2))
    first = worker.launch(burst(canvases, 2))
    goes_on = msgspec.structs.replace(burst(canvases, 3), burst_id=1, follows=0, states=[0, 1])
    second = worker.launch(goes_on)
    other = Worker(model, StepGraphs(model.device, Recorder()))
    assert worker.collect(first).states == other.run(burst(canvases, 2)).states
    same(worker.collect(second).states, Worker(golden_model).run(burst(canvases, 5)).states)
    one = msgspec.structs.replace(goes_on, burst_id=2, follows=1, specs=goes_on.specs[1:], states=[1])
    same(worker.run(one).states, Worker(golden_model).run(burst(canvases, 8)).states[1:])
    assert recorder.tapes[0].num_replays >= 1 + 3


def test_a_burst_ends_soon_after_its_canvases(model: TransformerDenoiser) -> None:
    canvases = [make(0, 12, unmask="threshold:0.1"), make(1, 12, unmask="threshold:0.1")]
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    worker.run(burst(canvases, 100))
    result = worker.run(burst(canvases, 100))
    assert all(state.finished for state in result.states)
    num_steps = max(state.num_forwards for state in result.states)
    assert num_steps + AHEAD_STEPS < 12
    num_taken = num_steps + AHEAD_STEPS - 1
    assert recorder.tapes[0].num_replays == num_taken - 1, "one step ran before the capture"
    goes_on = msgspec.structs.replace(burst(canvases, 100), burst_id=1, follows=0, states=[0, 1])
    after = worker.run(goes_on)
    assert (after.num_rows, after.states) == (0, result.states)


def test_an_error_in_a_later_step_is_its_bursts(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next burst, which follows it, is launched before it is collected."""
    monkeypatch.setattr("remask.workers.worker.Launched.wait", lambda self: None)  # a CPU waits at once
    answers, num_calls = TransformerDenoiser.statistics, 0

    def statistics(self: TransformerDenoiser, *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == AHEAD_STEPS + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(self, *args)

    monkeypatch.setattr(TransformerDenoiser, "statistics", statistics)
    worker = Worker(model)
    batch = burst([make(0, 12)], 5)
    first = worker.launch(batch)
    second = worker.launch(msgspec.structs.replace(batch, burst_id=1, follows=0, states=[0]))
    monkeypatch.undo()
    assert worker.collect(first).failure == "memory"
    assert worker.collect(second).failure == "skipped"
    assert worker.run(batch).failure is None


def test_requests_that_graphs_do_not_support_take_the_plain_path(
    golden_model: TransformerDenoiser, model: TransformerDenoiser
) -> None:
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    for fields in (
        {"cfg_scale": 1.0},
        {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9"},
        {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95,ban_old=true"},
        {"logit_bias": {5: 3.0}},
        {"temperature": 1.0, "top_p": 0.5},
        {"unmask": "dream:steps=7,alg=entropy,alg_temp=0.3", "temperature": 0.8},
        {"unmask": "schedule:steps=9", "remask": "rcr"},
        {"trace": True},
    ):
        canvases = [make(0, 12, **fields)]  # type: ignore[arg-type]
        expected = Worker(golden_model).run(burst(canvases))
        for _ in range(2):
            found = worker.run(burst(canvases))
            same(found.states, expected.states)
            assert [*map(len, found.events.values())] == [*map(len, expected.events.values())]
    assert not recorder.tapes


def test_rows_that_need_no_padding_get_none(model: TransformerDenoiser) -> None:
    canvases = [make(0, 60), make(1, 63)]
    assert sum(c.state.sequence_len for c in canvases) == 128
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    expected = Worker(model).run(burst(canvases)).states
    for _ in range(3):
        result = worker.run(burst(canvases))
        same(result.states, expected)
        assert result.num_rows == 5 * 128
    assert len(recorder.tapes) == 1


def test_every_row_of_a_filled_pack_belongs_to_a_sequence(model: TransformerDenoiser) -> None:
    canvases = [make(0, 12, remask="wino"), make(1, 30)]
    placed = StepGraphs(model.device, Recorder()).place(
        [c.spec for c in canvases], [c.state for c in canvases]
    )
    assert placed is not None
    (plan,) = placed.plans
    for layout in (plan.layout, plan.candidate_layout):
        assert layout.device is not None
        assert layout.device.cu_keys.tolist()[-1] == len(plan.token_index) == len(plan.positions)
        assert layout.device.cu_queries.tolist() == list(layout.cu_queries)
    assert plan.candidate_layout.cu_queries[-1] == len(plan.main.slots)
    assert plan.layout.cu_keys[-1] == len(plan.token_index)


def test_blocks_of_other_widths_have_other_graphs(model: TransformerDenoiser) -> None:
    """Canvases of equal lengths and policies, whose tensors all have the same shapes."""
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    fields = {"max_tokens": 24, "unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"}
    own = []
    for block_length in (4, 24) * 2:
        params = resolve(SamplingParams(block_length=block_length, **fields))
        own.append(new_canvas("r", 0, [5, 11], params, seed=0, sample=0, mask_id=0, stop_ids=[3]))
    for canvas in own:
        same(worker.run(burst([canvas])).states, Worker(model).run(burst([canvas])).states)
    assert len(recorder.tapes) == 2


def test_needs_and_policies_set_graphs_of_equal_shapes_apart(model: TransformerDenoiser) -> None:
    """Two policies have tensors of equal shapes; the scores differ only in what the head computes."""
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder))
    kinds = [
        "threshold:0.5",
        "capped_threshold:0.5",
        "schedule",
        "schedule:score=margin",
        "schedule:score=random",
    ]
    for kind in kinds * 2:
        canvases = [make(0, 12, unmask=kind)]
        same(worker.run(burst(canvases)).states, Worker(model).run(burst(canvases)).states)
    assert len(recorder.tapes) == len(kinds)


def test_the_least_recently_used_buffers_are_freed_to_keep_the_budget(model: TransformerDenoiser) -> None:
    sizes = [[make(0, 12)], [make(0, 70)], [make(0, 140)]]

    def twice(worker: Worker, canvases: list[Canvas]) -> None:
        for _ in range(2):
            worker.run(burst(canvases, 2))

    unbounded = StepGraphs(model.device, Recorder())
    for canvases in sizes:
        twice(Worker(model, unbounded), canvases)
    num_bytes = [shape.num_bytes for shape in unbounded._shapes.values()]
    recorder = Recorder()
    worker = Worker(model, StepGraphs(model.device, recorder, budget_bytes=sum(num_bytes)))  # and 3 of tapes
    for canvases in sizes:
        twice(worker, canvases)
    worker.run(burst(sizes[2], 2))
    assert [tape.num_replays for tape in recorder.tapes] == [1, 1, 1 + 2]
    twice(worker, sizes[0])
    assert len(recorder.tapes) == 4, "it has to be captured again"
    worker.run(burst(sizes[2], 2))
    assert recorder.tapes[2].num_replays == 1 + 2 + 2


def test_bursts_above_the_memory_budget_are_not_captured_again(
    model: TransformerDenoiser,
) -> None:
    recorder = Recorder(num_bytes=1 << 30)
    worker = Worker(model, StepGraphs(model.device, recorder, budget_bytes=1 << 20))
    large, small = [make(i, 70) for i in range(6)], [make(0, 12)]
    expected = Worker(model).run(burst(large)).states
    for _ in range(4):
        same(worker.run(burst(large)).states, expected)
    assert len(recorder.tapes) == 1
    recorder.num_bytes = 1
    for _ in range(3):
        worker.run(burst(small))
    assert len(recorder.tapes) == 2, "smaller ones are"
    assert recorder.tapes[1].num_replays > 0


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation not permitted when capturing")],
    ids=repr,
)
def test_a_step_that_cannot_be_captured_runs_plainly(
    model: TransformerDenoiser, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def capture(step: Callable[[], int]) -> tuple[Graph, int, int]:
        raise error

    worker = Worker(model, StepGraphs(model.device, capture))
    expected = Worker(model).run(burst([make(0, 12)])).states
    for _ in range(3):
        result = worker.run(burst([make(0, 12)]))
        assert result.failure is None
        same(result.states, expected)
    assert (
        caplog.text.count(f"cannot capture a step; bursts of this shape run without a graph: {error!r}"[:60])
        == 1
    )


def test_shapes_that_are_met_once_are_forgotten(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHAPES", 3)
    graphs = StepGraphs(model.device, Recorder())
    for length in range(10, 700, 70):
        graphs.place([c.spec for c in [make(0, length)]], [c.state for c in [make(0, length)]])
    assert len(graphs._shapes) == 3
