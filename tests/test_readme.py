"""README.md: its code runs, and its figures are those of the committed measurements."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from remask.benchmarks import (
    batch_invariance,
    exactness,
    fp8_quality,
    latency,
    planner,
    ray_workers,
    scaling,
    scheduling,
    throughput,
)
from remask.benchmarks.gpu import figures
from remask.benchmarks.serving import compare
from remask.benchmarks.tiny import evaluate
from remask.benchmarks.tiny.tasks import SUDOKU_6X6

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
README_LINE = README.replace("\n", " ")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "bash" and "remask " in line and not re.search("/models/|remask bench|--gpu this", line)
]


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for language, block in BLOCKS if language == "python" and "puzzle" in block]
    exec(compile(code, "README.md", "exec"), {})
    (puzzle,) = re.findall(r'puzzle = "(.*)"', code)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        text, nfe, tokens_per_forward = line.split()
        assert len(text) == 36
        assert SUDOKU_6X6.is_correct(puzzle, text), "the example shows a puzzle that gets solved"
        assert float(tokens_per_forward) == pytest.approx(36 / int(nfe), abs=0.06)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("what", ['distributed_executor_backend="ray"', "AsyncLLM"])
def test_the_other_python_examples_run(what: str) -> None:
    (code,) = [block for language, block in BLOCKS if language == "python" and what in block]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0579" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(
    command: str,
    remask: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours in this process, whatever else the line holds in a shell."""
    monkeypatch.chdir(tmp_path)
    told = ""
    for step in command.split(" && "):
        told = ""
        for part in step.split(" | "):
            if part.startswith("remask "):
                run = remask(*shlex.split(part)[1:], stdin=told)
            else:
                run = subprocess.run(part, shell=True, input=told, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            told = run.stdout
    assert told


@pytest.mark.slow
def test_a_command_with_a_pipe_runs_in_a_shell(tmp_path: Path) -> None:
    (command,) = [line for line in COMMANDS if line.endswith("| remask trace --png map.png")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 3


def table(header: str) -> list[list[str]]:
    """The cells below a table's header line."""
    lines = README.splitlines()
    start = lines.index(header) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_evaluation_table_is_the_committed_evaluation_and_reaches_its_bounds() -> None:
    results = json.loads((ROOT / "benchmarks/results/evaluation.json").read_text())["results"]
    rows = table(f"| {' | '.join(evaluate.table_header())} |")
    policies = list(dict.fromkeys(result["policy"] for result in results))
    assert rows == [evaluate.table_cells(policy, results) for policy in policies]
    lens = {r["policy"]: r["nfe"] * r.get("tokens_per_forward", 1) for r in results if r["task"] == "text"}
    short, long, drawn = (f"{lens[p]:.0f}" for p in ("one token a step", evaluate.TWIN, "random order"))
    assert (short, f"where the twin writes {long}:" in README, f"it is {drawn} tokens" in README) == (
        "4",
        True,
        True,
    )
    found = {r["task"]: r["score"] for r in results if r["policy"] == "one token a step"}
    assert found["sudoku6x6"] >= 0.7
    assert found["sudoku4x4"] > 0.95
    assert found["addition3"] > 0.9


def test_the_scheduling_table_is_the_committed_measurement_and_within_its_bounds() -> None:
    results = json.loads((ROOT / "benchmarks/results/scheduling.json").read_text())["results"]
    rows = table(
        "| live canvases | 64 scheduled: us a canvas and step | all scheduled: us a canvas and step "
        "| us a waiting one and step | us a request |"
    )
    assert rows == [scheduling.cells(r) for r in results]
    for r in results:
        assert max(r["us_per_scheduled"], r["us_per_scheduled_all"]) <= 25
        assert (r["us_per_waiting"] or 0) <= 1
    assert [r["live"] for r in results] == [64, 256, 1024, 4096, 16384]


def test_the_figures_of_batch_files_are_the_committed_measurement() -> None:
    measured = json.loads((ROOT / "benchmarks/results/batch_file.json").read_text())
    rss = measured["rss_mb_after_first_minute"]
    found = re.search(r"Over ([\d,]+) sudokus .* between (\d+) and (\d+) MB .* at ([\d.]+) %", README_LINE)
    assert found is not None
    assert found.groups() == (
        f"{measured['lines']:,}",
        f"{rss['min']:.0f}",
        f"{rss['max']:.0f}",
        f"{measured['rate_of_batch_to_generate']:.1%}"[:-1],
    )
    assert measured["results"] == measured["lines"]


def test_the_speed_table_is_the_committed_measurement() -> None:
    results = json.loads((ROOT / "benchmarks/results/golden.json").read_text())["results"]
    rows = table("| decoder | equal cases | NFE | median seconds | times as fast (min to max) |")
    assert len(rows) == len(results)
    for decoder, equal, nfe, seconds, ratio in rows:
        result = results[decoder]
        times = result["times_as_fast"]
        assert equal == f"{result['equal_cases']}/32"
        assert int(nfe) == result["nfe"]
        assert seconds == f"{statistics.median(result['seconds']):.2f}"
        assert ratio == f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


def test_the_exactness_table_is_the_committed_measurement() -> None:
    results = json.loads((ROOT / "benchmarks/results/exactness.json").read_text())["results"]
    header = "| policy | " + " | ".join(
        f"distance, blocks of {n} | bits | forwards" for n in exactness.BLOCK_LENS
    )
    policies = [exactness.CHAIN, *exactness.POLICIES]
    assert table(f"{header} |") == [exactness.table_cells(policy, results) for policy in policies]


def test_the_figures_of_mixed_batches_are_the_committed_measurement_and_within_their_bound() -> None:
    ratio = json.loads((ROOT / "benchmarks/results/mixed_policies.json").read_text())["results"]["ratio"]
    found = re.search(r"takes ([\d.]+) times as long \(([\d.]+) to ([\d.]+)\) as", README_LINE)
    assert found is not None
    assert found.groups() == tuple(f"{ratio[kind]:.2f}" for kind in ("median", "min", "max"))
    assert ratio["median"] <= 1.15


def test_the_cost_of_batch_invariance_is_the_committed_measurement() -> None:
    results = json.loads((ROOT / "benchmarks/results/batch_invariance.json").read_text())["results"]
    header = "| model | requests | seconds | with `batch_invariant` | times as long (min to max) |"
    assert table(header) == [batch_invariance.cells(result) for result in results]


def test_what_fp8_costs_is_the_committed_measurement() -> None:
    results = json.loads((ROOT / "benchmarks/results/fp8_quality.json").read_text())["results"]
    assert table(f"| {' | '.join(fp8_quality.HEADER)} |") == [fp8_quality.cells(result) for result in results]
    worst = min(result["fp8_minus_bfloat16"] for result in results)
    assert f"cost up to {-100 * worst:.1f} points" in README_LINE


def test_the_comparison_with_the_twin_is_the_committed_measurement() -> None:
    report = json.loads((ROOT / "benchmarks/results/compare.json").read_text())
    rows = [compare.table_cells(result, report["quality"]) for result in compare.ordered(report)]
    assert table(f"| {' | '.join(compare.HEADER)} |") == rows
    for policy, words in report["crossovers"].items():
        assert f"- {policy}: {words}" in README
    used = [100 * r["gemm_utilization"]["median"] for r in report["results"] if "gemm_utilization" in r]
    assert f"uses {min(used):.0f} to {max(used):.0f} % of the matrix rate" in README_LINE
    assert {result["failed"] for result in report["results"]} == {0}
    assert {quality["problems"] for quality in report["quality"].values()} == {256}


def test_the_table_of_a_gpu_is_the_committed_measurement() -> None:
    report = json.loads((ROOT / "benchmarks/results/h200.json").read_text())
    assert table(f"| {' | '.join(figures.HEADER)} |") == [list(row) for row in figures.cells(report)]
    assert not report["small"]
    kinds = report["stages"]["c"]["parts"]["kinds of requests"]["step_ms"]
    assert {name for name, ms in kinds.items() if ms > 50} == {"top_p", "wino", "guidance"}


def test_the_latency_table_is_the_committed_measurement() -> None:
    report = json.loads((ROOT / "benchmarks/results/latency.json").read_text())
    rows = [latency.cells(name, result) for name, result in report["results"].items()]
    assert table(f"| {' | '.join(latency.HEADER)} |") == rows
    assert report["batch_size"] == 1


def test_ratios_are_of_as_many_repetitions_as_is_said_and_machines_that_changed_are_told() -> None:
    said = {
        "batch_invariance": 5,
        "compare": 9,
        "golden": 9,
        "latency": 10,
        "mixed_policies": 9,
        "ray_workers": 5,
        "throughput": 5,
    }
    reports = {name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in said}
    for name, count in said.items():
        report = reports[name]
        latencies = report["results"]["engine"]["latencies"] if name == "latency" else ()
        assert report.get("repetitions", len(latencies)) == count, name
    notes = " ".join(note for report in reports.values() for note in report.get("notes", ()))
    assert "Not finished" not in notes
    changes = [re.findall(r"rate changed by (\d+) % meanwhile", text) for text in (notes, README_LINE)]
    assert sorted(changes[0]) == sorted(changes[1])


def test_the_plan_is_the_planners_and_within_its_bound_on_a_real_machine() -> None:
    planned = planner.report("llada-8b", "h200", planner.Load(128, 256, 32, 3.0), "bfloat16")
    assert f"the knee is {planned['knee_rows']} rows" in README_LINE
    assert f"the crossover is at {planned['crossover']} requests" in README_LINE
    checked = json.loads((ROOT / "benchmarks/results/plan.json").read_text())["check"]
    worst = max(abs(check["planned_over_real"] - 1) for check in checked)
    assert f"the plan is off by at most {100 * worst:.0f} %" in README_LINE
    assert worst <= 0.2


def test_the_figures_of_ray_are_the_committed_measurements_and_within_their_bounds() -> None:
    report = json.loads((ROOT / "benchmarks/results/ray_workers.json").read_text())
    header = "| workers | seconds on Ray | seconds in process | Ray times as fast (min to max) |"
    assert table(header) == [ray_workers.cells(result) for result in report["results"]]
    one, two = (result["ratio"]["median"] for result in report["results"])
    assert one >= 0.95
    assert two >= 0.93
    trip = report["round_trip_ms"]["median"]
    assert f"takes {trip:.1f} ms beyond its compute" in README
    assert trip <= 3
    latencies = json.loads((ROOT / "benchmarks/results/latency.json").read_text())["results"]
    step = latencies["engine"]["ms_per_step"]
    assert (
        f"the tiny model takes {step:.0f} ms (above), that would be {100 * trip / step:.0f} %" in README_LINE
    )
    results = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["results"]
    parts = (256 * results[-1]["us_per_canvas"] / 1000, results[-1]["encoding_ms"]["median"], trip)
    schedule, encode, call = (f"{part:.1f}" for part in parts)
    assert f"({schedule} to schedule, {encode} to encode and decode, {call} for Ray's call)" in README_LINE
    assert f"process about {sum(parts):.1f} ms" in README_LINE
    assert "up to some 75 of them" in README_LINE
    assert 1000 / sum(parts) / 5.6 == pytest.approx(75, abs=5)
    header = (
        "| workers | live canvases | bursts a second | million canvas-steps a second "
        "| us a canvas and burst | ms to encode a burst |"
    )
    assert table(header) == [scaling.cells(result) for result in results]


def test_the_figures_of_chaos_are_the_committed_measurement() -> None:
    found = json.loads((ROOT / "benchmarks/results/chaos.json").read_text())["results"]
    assert (found["missing_or_repeated"], found["changed"]) == (0, 0)
    assert (found["actors_left"], found["processes_left"]) == (0, 0)
    assert (
        f"Its {found['runs']} runs survived {found['killed_workers']} killed workers and "
        f"{found['removed_nodes']} removed nodes"
    ) in README_LINE


def test_the_throughput_table_is_the_committed_measurement() -> None:
    report = json.loads((ROOT / "benchmarks/results/throughput.json").read_text())
    header = (
        "| decoder | equal | NFE | rows/forward | seconds | tokens/s "
        "| times as fast (min to max) | GEMM rate used (min to max) |"
    )
    assert table(header) == [throughput.cells(name, result) for name, result in report["results"].items()]
    assert (report["model"], report["workload"], report["num_requests"]) == ("llada-124m", "mixed", 16)
    engine = report["results"]["engine, float32"]
    assert engine["equal_requests"] == 16
    assert engine["times_as_fast"]["median"] >= 1.25
    assert engine["gemm_utilization"]["median"] >= 0.75
    bf16, fp32 = (
        statistics.median(report["results"][f"engine, {dtype}"]["gemm_gflop_per_second"])
        for dtype in ("bfloat16", "float32")
    )
    assert f"{bf16 / fp32:.1f} times as fast in bf16 as in fp32" in README_LINE
    assert report["results"]["engine, bfloat16"]["gemm_utilization"]["median"] >= 0.6
