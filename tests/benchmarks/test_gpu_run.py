"""The script for GPUs, end to end on a CPU, and from a checkout that is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remask.benchmarks.gpu import run, timing
from remask.benchmarks.utilization import linear_flops
from remask.workers.models.denoiser import TransformerDenoiser, multiplies
from remask.workers.worker import Worker

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"

BARE = """
import runpy, sys
sys.path = [path for path in sys.path if "__editable__" not in path]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
script = runpy.run_path(sys.argv[1], run_name="script")
import remask.workers.kernels.head as module
print(script["PATH"], module.__file__)
"""


has_bfloat16 = multiplies(torch.bfloat16, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16, reason="it multiplies bf16, and this CPU cannot")
def test_the_small_mode_measures_everything(tmp_path: Path) -> None:
    output = tmp_path / "small.json"
    command = [sys.executable, str(SCRIPT), "--small", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(output.read_text())
    assert set(run.KEYS) <= set(measured)
    assert "errors" not in measured
    assert measured["equal_requests_fp32"] == "3/3"
    assert measured["small"]
    assert measured["ratio_plain_mixed"] > 1
    assert {point["requests"] for point in measured["grid"]} == {1, 2}
    assert measured["knee_rows"] in {point["rows"] for point in measured["grid"]}
    assert output.with_suffix(".png").stat().st_size > 1000


def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, str(SCRIPT)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"TRITON_INTERPRET": "1", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    folder, module = done.stdout.split()
    assert module.startswith(folder)


def test_an_error_ends_a_part_and_not_the_run(tmp_path: Path) -> None:
    report = run.Report(tmp_path / "out.json", started=timing.time.perf_counter(), budget=60)
    report.part("first", lambda: {"gemm_tflops": 1 / 0})
    report.part("second", lambda: {"fp8_over_bf16": 2.0})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["errors"] == {"first": "ZeroDivisionError: division by zero"}
    assert written["fp8_over_bf16"] == 2.0
    late = run.Report(tmp_path / "late.json", started=timing.time.perf_counter() - 61, budget=60)
    late.part("first", lambda: {"gemm_tflops": 1.0})
    assert late.content["left_out"] == ["first"]


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
