"""The knee: how it is read off rates, and that it is measured once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remask import LLM
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.startup import knee as module
from remask.workers.startup.knee import find_knee, knee, measure, num_flat
from remask.workers.worker import Worker


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([10, 20, 40, 80], 1024),  # still growing: the largest that was looked at
        ([10, 20, 20.5, 20.2], 256),  # flat from 256 on, but for what is within the tolerance
        ([10, 20, 23, 18], 512),
        ([20, 20, 19, 12], 128),
        ([7], 128),
    ],
)
def test_the_knee_is_the_fewest_rows_with_nearly_the_best_rate(rates: list[float], expected: int) -> None:
    assert find_knee([(128 << i, rate) for i, rate in enumerate(rates)]) == expected


@pytest.mark.parametrize(
    ("rates", "expected"), [([], 0), ([1], 0), ([10, 10.2], 1), ([10, 10.2, 10.4], 2), ([10, 10.2, 11], 0)]
)
def test_a_point_is_flat_that_gains_nothing_over_the_best(rates: list[float], expected: int) -> None:
    assert num_flat([(i, rate) for i, rate in enumerate(rates)]) == expected


def simulated(monkeypatch: pytest.MonkeyPatch, times: Iterator[float] | None = None) -> list[int]:
    """Replaces the clock: fewer than 700 rows take as long as 700. Returns the numbers of rows measured."""
    asked: list[int] = []

    def seconds(_: object, batch: Any) -> float:
        rows = sum(state.sequence_len for state in batch.states)
        asked.append(rows)
        return max(rows, 700) * (next(times) if times is not None else 1.0)

    monkeypatch.setattr(module, "_seconds", seconds)
    return asked


def test_measuring_stops_where_nothing_is_gained(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = simulated(monkeypatch)
    points, complete = measure(golden_model)
    assert complete
    rows = min(128, golden_model.config.max_len)
    assert [point[0] for point in points] == [rows << i for i in range(len(points))]
    assert find_knee(points) == next(point[0] for point in points if point[0] >= 700 * 0.95)
    assert 2048 <= points[-1][0] <= 4096
    assert len(asked) == 3 * len(points)


def test_on_a_gpu_only_captured_steps_are_timed_and_packing_is_not(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst takes 5 ms of packing and 2 ms a step, or 50 ms a step until its shape was met twice."""
    now, met = [0.0], [0]

    def run(worker: Worker, batch: StepBatch) -> StepResult:
        assert not batch.states[0].finished  # type: ignore[union-attr]
        met[0] += 1
        now[0] += 0.005 + batch.num_steps * (0.050 if met[0] <= 2 else 0.002)
        return StepResult(burst_id=0, states=[], num_rows=0, seconds=0.0)

    monkeypatch.setattr(Worker, "run", run)
    monkeypatch.setattr(Worker, "overlaps", True)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    canvases = module._examples(golden_model.config, 128, 4)
    assert module._step_seconds(Worker(golden_model), canvases) == pytest.approx(0.002)
    state = canvases[0].state
    assert len(state.token_array()) == 128
    monkeypatch.undo()
    (after,) = Worker(golden_model).run(module._burst(canvases[:1], 1 + module.GRAPH_STEPS)).states
    assert (after.num_forwards, after.finished) == (1 + module.GRAPH_STEPS, False), "no canvas ends before"


def test_a_slow_moment_does_not_move_the_knee(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(monkeypatch)
    expected = find_knee(measure(golden_model)[0])
    slow = iter(3.0 if i in (1, 2, 9) else 1.0 for i in range(100))
    simulated(monkeypatch, slow)
    assert find_knee(measure(golden_model)[0]) == expected


def test_the_knee_is_measured_once_for_a_model_device_and_dtype(
    golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = simulated(monkeypatch)
    model = load_denoiser(golden_checkpoint, dtype="float32", device="cpu")
    first, num_asked = knee(model), len(asked)
    assert num_asked > 0
    assert knee(model) == first
    assert len(asked) == num_asked
    knee(load_denoiser(golden_checkpoint, dtype="bfloat16", device="cpu"))
    assert len(asked) == 2 * num_asked
    kept = [json.loads(path.read_text()) for path in (tmp_path / "remask" / "knee").iterdir()]
    assert [entry["knee"] for entry in kept] == [first, first]
    assert {entry["of"]["dtype"] for entry in kept} == {"torch.float32", "torch.bfloat16"}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"knee": "many"}', '{"knee": 0}'])
def test_a_broken_cache_is_measured_over(
    golden_model: TransformerDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    simulated(monkeypatch)
    expected = knee(golden_model)
    (path,) = (tmp_path / "remask" / "knee").iterdir()
    path.write_text(content)
    assert knee(golden_model) == expected
    assert json.loads(path.read_text())["knee"] == expected


def test_a_cache_that_cannot_be_written_is_no_error(
    golden_model: TransformerDenoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    simulated(monkeypatch)
    assert knee(golden_model) > 0
    assert "cannot be kept" in caplog.text


def test_a_start_that_ran_out_of_time_is_not_kept(
    golden_model: TransformerDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = simulated(monkeypatch)
    monkeypatch.setattr(module, "SECONDS", -1.0)
    assert knee(golden_model) == min(128, golden_model.config.max_len)
    assert len(asked) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    simulated(monkeypatch)
    assert knee(golden_model) > 128


def test_without_a_home_the_knee_is_measured_and_not_kept(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    simulated(monkeypatch)
    assert knee(golden_model) > 0


def test_an_engine_takes_the_knee_unless_given_another(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr("remask.workers.startup.start.knee", never)
    LLM(golden_checkpoint, device="cpu", max_num_rows=100).close()
    with pytest.raises(AssertionError, match="measured"):
        LLM(golden_checkpoint, device="cpu")
