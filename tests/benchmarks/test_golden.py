"""The speed comparison: both sides write the reference tokens, and a difference would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remask.benchmarks.golden import measure, params_of, read_cases
from remask.benchmarks.plain_loop import decode
from remask.workers.models.denoiser import TransformerDenoiser


def test_the_plain_loop_writes_the_reference_tokens(
    golden_model: TransformerDenoiser, golden_cases: list[dict[str, Any]]
) -> None:
    cases = [case for case in golden_cases if case["policy"] == "fastdllm"]
    for case in cases[::4]:
        decoded = decode(golden_model, case["prompt"], params_of(case))
        assert decoded == (case["output"], case["nfe"])


@pytest.mark.slow
def test_measuring_counts_equal_cases_and_forwards(golden_checkpoint: Path) -> None:
    cases = sorted(read_cases(golden_checkpoint.parent, "fastdllm"), key=lambda case: case["nfe"])[:2]
    broken = {**cases[1], "output": [5] * len(cases[1]["output"])}
    report = measure(golden_checkpoint, [cases[0], broken], repetitions=1)
    for name in ("plain loop, float32", "engine, float32"):
        assert report["results"][name]["equal_cases"] == 1
        assert report["results"][name]["nfe"] == cases[0]["nfe"] + cases[1]["nfe"]
        assert len(report["results"][name]["seconds"]) == 1
