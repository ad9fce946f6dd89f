"""The script for GPUs, end to end on a CPU, and from a checkout that is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remask.benchmarks.gpu import run, timing
from remask.benchmarks.gpu.stage_report import Report
from remask.benchmarks.utilization import linear_flops
from remask.workers.models.cpu import multiplies
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Worker

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"

BARE = """
import runpy, sys
sys.path = [path for path in sys.path if "__editable__" not in path]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
runpy.run_path(sys.argv[1], run_name="script")["make_importable"]()
import remask.workers.kernels.head as module
print(sys.path[0], module.__file__)
"""


has_bfloat16 = multiplies(torch.bfloat16, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16, reason="it multiplies bf16, and this CPU cannot")
def test_the_small_mode_measures_everything(tmp_path: Path) -> None:
    output = tmp_path / "small.json"
    command = [sys.executable, str(SCRIPT), "--small", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert tuple(report["figures"]) == run.KEYS
    assert report["missing"] == []
    assert report["small"]
    assert report["environment"]["cpus"] > 0
    parts = {}
    for stage in report["stages"].values():
        assert (stage["status"], stage["errors"], stage["unfinished"]) == (0, {}, [])
        parts |= stage["parts"]
    assert parts["golden cases"]["equal_cases_fp32"] == "3/3"
    assert parts["equal tokens"]["equal_requests_fp32"] == "3/3"
    assert report["figures"]["ratio_plain_mixed"] > 0  # how much is a matter of the machine and of its load
    assert {point["requests"] for point in parts["grid"]["points"]} == {1, 2}
    assert parts["grid"]["knee_rows"] in {point["rows"] for point in parts["grid"]["points"]}
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, str(SCRIPT)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"TRITON_INTERPRET": "1", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    folder, module = done.stdout.split()
    assert module.startswith(folder)


def test_an_error_ends_a_part_and_not_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report = Report(path, budget_seconds=60)
    report.plan("first", "second", "third")
    assert json.loads(path.read_text())["unfinished"] == ["first", "second", "third"]
    report.part("first", lambda: {"gemm_tflops": 1 / 0})
    report.part("second", lambda: {"fp8_over_bf16": 2.0, "detail": "kept"})
    written = json.loads(path.read_text())
    assert written["errors"] == {"first": "ZeroDivisionError: division by zero"}
    assert written["figures"] == {"fp8_over_bf16": 2.0}
    assert written["parts"] == {"second": {"fp8_over_bf16": 2.0, "detail": "kept"}}
    assert written["unfinished"] == ["third"]


def test_a_part_that_would_begin_too_late_is_unfinished(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", budget_seconds=-1)
    report.plan("first")
    report.part("first", lambda: {"gemm_tflops": 1.0})
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["figures"], written["unfinished"]) == ({}, ["first"])


def test_a_stage_that_is_stopped_keeps_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "stuck.py"
    stuck.write_text(
        "import json, sys, time\n"
        "path = sys.argv[sys.argv.index('--output') + 1]\n"
        "content = {'figures': {'gemm_tflops': 7.0}, 'parts': {}, 'errors': {}, 'unfinished': ['grid']}\n"
        "open(path, 'w').write(json.dumps(content))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(run, "__file__", str(stuck))
    content = run.run_stage("b", tmp_path / "out.b.json", 2, [])
    assert content["status"] == "stopped after 2 s"
    assert (content["figures"], content["unfinished"]) == ({"gemm_tflops": 7.0}, ["grid"])
    assert not (tmp_path / "out.b.json").exists()


def test_stages_are_merged_and_earlier_figures_are_kept() -> None:
    stages = {
        "a": {"environment": {"gpu": "new"}, "figures": {}, "parts": {"x": 1}},
        "b": {"environment": {"gpu": "new"}, "figures": {"gemm_tflops": 2.0}, "parts": {}},
    }
    before = {
        "environment": {"gpu": "old"},
        "figures": {"gemm_tflops": 1.0},
        "stages": {"b": {}},
        "earlier": [{"figures": {"gemm_tflops": 0.5}}],
    }
    report = run.merge(stages, before, small=False)
    assert report["environment"] == {"gpu": "new"}
    assert report["figures"] == {"gemm_tflops": 2.0}
    assert set(report["missing"]) == set(run.KEYS) - {"gemm_tflops"}
    assert report["stages"]["a"] == {"parts": {"x": 1}}
    assert [entry["figures"]["gemm_tflops"] for entry in report["earlier"]] == [1.0, 0.5]


@pytest.mark.slow
def test_without_a_gpu_only_the_small_mode_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--small" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_the_arithmetic_that_counts_is_that_of_the_steps_that_are_timed(
    golden_model: TransformerDenoiser,
) -> None:
    config = golden_model.config
    asked = timing.canvases(config, 3, 8, 40)
    first, last, again = (timing.needed_flops(config, asked, range(i, i + 1)) for i in (0, 31, 32))
    pairs = 31 * 3 * 48 * 4 * config.num_heads * config.head_dim
    assert first - last == linear_flops(config, 144, 96) - linear_flops(config, 144, 3) + pairs
    assert again == first, "a new block is masked"
    device = golden_model.device
    assert timing.step_seconds(Worker(golden_model), asked, device, num_steps=2, num_bursts=1) > 0
