"""The parts of the stage that checks the correctness of results on the GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from remask import LLM
from remask.benchmarks import plain_loop
from remask.benchmarks.golden import params_of, read_cases
from remask.benchmarks.gpu.run import ROOT
from remask.benchmarks.gpu.stage_report import Report, Sizes
from remask.benchmarks.throughput import find_model
from remask.benchmarks.workloads import Job, mixed
from remask.workers.models.denoiser import load_denoiser


def start_gpu_tests(log: Path) -> subprocess.Popen[bytes]:
    """The tests marked `gpu` in a process of their own, which writes its output to a file."""
    in_parallel = ["-n", "8"] if importlib.util.find_spec("xdist") is not None else []
    without_ray = ["--ignore-glob=tests/workers/test_ray_*"]  # these tests import Ray
    where = ["tests/workers", "tests/engine/test_golden_families.py", "tests/engine/test_reuse.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *in_parallel, *without_ray, *where]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def outcome_of(tests: subprocess.Popen[bytes] | None, report: Report) -> dict[str, Any]:
    """Counts and failures of the tests. Waits until they have finished or the stage's time is over."""
    if tests is None:
        return {"outcome": "not run: no GPU"}
    try:
        tests.wait(max(1.0, report.seconds_left()))
    except subprocess.TimeoutExpired:
        tests.kill()
    lines = report.path.with_suffix(".log").read_text().splitlines()
    counts = [line for line in lines if re.match(r"\d+ (passed|failed|error|skipped)", line)]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"outcome": counts[-1] if counts else "not finished", "failed": failed}


def golden_cases(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """How many of Fast-dLLM's golden cases are reproduced in fp32, token by token and forward by forward."""
    directory = ROOT / "tests" / "data" / "golden"
    cases = read_cases(directory, "fastdllm")[: sizes.num_golden]
    with LLM(directory / "llada-tiny", dtype="float32", device=str(device), max_num_rows=4096) as llm:
        outputs = llm.generate(
            [case["prompt"] for case in cases], [params_of(case) for case in cases], use_tqdm=False
        )
    equal = [
        (out.outputs[0].token_ids, out.outputs[0].nfe) == (case["output"], case["nfe"])
        for out, case in zip(outputs, cases, strict=True)
    ]
    return {"equal_cases_fp32": f"{sum(equal)}/{len(equal)}"}


def equal_tokens(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Requests whose tokens are equal from engine and plain loop, in fp32 on a small model."""
    directory, load_format = find_model(sizes.equal_model)
    with LLM(
        directory, dtype="float32", device=str(device), load_format=load_format, max_num_rows=1024
    ) as llm:
        model = load_denoiser(directory, dtype="float32", device=str(device), load_format=load_format)
        jobs: list[Job] = mixed(llm.tokenizer, model.config, sizes.num_equal)
        outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
        written = [plain_loop.decode(model, job.prompt, job.params).token_ids for job in jobs]
    equal = [out.outputs[0].token_ids == own for out, own in zip(outputs, written, strict=True)]
    return {"equal_requests_fp32": f"{sum(equal)}/{len(equal)}"}
