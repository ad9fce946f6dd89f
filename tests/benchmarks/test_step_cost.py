"""The cost of a step beside the model: what is measured is a real step of unfinished canvases."""

from __future__ import annotations

from remask.benchmarks.step_cost import measure, one_step, puzzles
from remask.benchmarks.throughput import find_model
from remask.workers.models.denoiser import load_denoiser


def test_the_parts_of_a_step_are_measured_on_canvases_that_verify_too() -> None:
    directory, load_format = find_model("tiny")
    assert load_format == "auto"
    model = load_denoiser(directory, dtype="float32", device="cpu")
    canvases = puzzles(directory, model, 16)
    assert len(canvases) == 16
    assert all(canvas.state.num_forwards == 1 and not canvas.state.finished for canvas in canvases)
    assert {type(canvas.spec.unmask).__name__ for canvas in canvases} >= {"Schedule", "Threshold", "Factor"}
    assert any(canvas.spec.remask is not None for canvas in canvases)
    parts = one_step(model, canvases)
    assert all(0 < milliseconds < 1000 for milliseconds in parts.values())
    assert parts["model_ms"] > parts["step_beside_model_ms"]


def test_the_report_has_a_spread_for_each_part() -> None:
    report = measure(count=3, repetitions=3)
    parts = ["model_ms", "step_beside_model_ms", "burst_beside_step_ms", "rebuild_ms"]
    assert list(report) == parts
    for result in report.values():
        assert 0 < result["min"] <= result["median"] <= result["max"]
