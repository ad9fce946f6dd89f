"""The committed measurements are finished, of as many repetitions as they need, and within their bounds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from remask.benchmarks import planner

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
REPORTS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


@pytest.mark.parametrize("name", REPORTS)
def test_a_measurement_is_finished_and_says_where_it_was_taken(name: str) -> None:
    report = REPORTS[name]
    assert not [note for note in report.get("notes", ()) if "Not finished" in note]
    assert {"date", "commit", "cpu", "gpu", "threads", "python", "versions"} <= report["environment"].keys()


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("batch_invariance", 5),
        ("compare", 9),
        ("golden", 9),
        ("mixed_policies", 9),
        ("ray_workers", 5),
        ("throughput", 5),
    ],
)
def test_ratios_are_of_several_repetitions(name: str, least: int) -> None:
    assert REPORTS[name]["repetitions"] >= least


def test_the_study_runs_at_least_twice_as_fast_as_the_plain_loop() -> None:
    (result,) = REPORTS["study_speed"]["results"]
    assert result["ratio"]["median"] >= 2
    assert REPORTS["study_speed"]["repetitions"] >= 5


def test_serving_over_http_costs_little() -> None:
    results = REPORTS["server_cost"]["results"]
    at_once = [r for r in results if r["max_concurrency"] == 64 and r["load"].startswith("64 slots")]
    assert [r["ratio"]["median"] >= 0.9 for r in at_once] == [True]


def test_the_committed_study_has_failed_nowhere() -> None:
    summary = json.loads((RESULTS / "study" / "summary.json").read_text())
    assert (summary["num_cells"], summary["num_samples"], summary["num_failed"]) == (333, 144_064, 0)
    assert len({row["claim"] for row in summary["claims"]}) == 9


def test_the_tiny_model_solves_its_tasks_one_token_a_step() -> None:
    found = {
        r["task"]: r["score"] for r in REPORTS["evaluation"]["results"] if r["policy"] == "one token a step"
    }
    assert found["sudoku6x6"] >= 0.7
    assert found["sudoku4x4"] > 0.95
    assert found["addition3"] > 0.9


def test_the_engine_is_faster_than_the_plain_loop_and_writes_the_same() -> None:
    results = REPORTS["throughput"]["results"]
    engine = results["engine, float32"]
    assert engine["equal_requests"] == engine["num_requests"] == 16
    assert engine["times_as_fast"]["median"] >= 1.25
    assert engine["gemm_utilization"]["median"] >= 0.75
    assert results["engine, bfloat16"]["gemm_utilization"]["median"] >= 0.6
    golden = REPORTS["golden"]
    assert golden["results"]["engine, float32"]["equal_cases"] == golden["cases"]


def test_scheduling_costs_little_and_waiting_next_to_nothing() -> None:
    results = REPORTS["scheduling"]["results"]
    assert [r["live"] for r in results] == [64, 256, 1024, 4096, 16384]
    for r in results:
        assert max(r["us_per_scheduled"], r["us_per_scheduled_all"]) <= 25
        assert (r["us_per_waiting"] or 0) <= 1


def test_mixed_policies_cost_little() -> None:
    assert REPORTS["mixed_policies"]["results"]["ratio"]["median"] <= 1.15


def test_workers_on_ray_keep_up_with_engines_of_their_own() -> None:
    report = REPORTS["ray_workers"]
    one, two = (result["ratio"]["median"] for result in report["results"])
    assert one >= 0.95
    assert two >= 0.93
    assert report["round_trip_ms"]["median"] <= 3


def test_nothing_is_lost_or_changed_when_workers_die() -> None:
    found = REPORTS["chaos"]["results"]
    assert found["killed_workers"] > 0
    assert found["removed_nodes"] > 0
    assert {found[n] for n in ("missing_or_repeated", "changed", "actors_left", "processes_left")} == {0}


def test_a_batch_file_has_all_results() -> None:
    assert REPORTS["batch_file"]["results"] == REPORTS["batch_file"]["lines"]


def test_the_comparison_with_the_twin_lost_no_request() -> None:
    report = REPORTS["compare"]
    assert {result["failed"] for result in report["results"]} == {0}
    assert {quality["problems"] for quality in report["quality"].values()} == {256}


def test_the_run_on_a_gpu_was_a_whole_one_and_wrote_what_the_reference_writes() -> None:
    report = REPORTS["h200"]
    assert not report["small"]
    assert not report["missing"]
    parts = report["stages"]["a"]["parts"]
    assert parts["golden cases"]["equal_cases_fp32"] == "32/32"


def test_the_plan_is_near_a_real_machine() -> None:
    checked = REPORTS["plan"]["check"]
    assert max(abs(check["planned_over_real"] - 1) for check in checked) <= 0.2
    planned = planner.report("llada-8b", "h200", planner.Load(128, 256, 32, 3.0), "bfloat16")
    assert planned["knee_rows"] > 0
    assert statistics.mean(check["batch_size"] for check in checked) > 1
