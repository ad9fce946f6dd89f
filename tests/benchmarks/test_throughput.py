"""The throughput benchmark: its workloads, and `remask bench throughput` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remask import LLM, InvalidRequest
from remask.benchmarks import throughput, workloads
from remask.benchmarks.plain_canvas import Decoded
from remask.workers.models.denoiser import TransformerDenoiser

VLLM_KEYS = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}
OWN_KEYS = {"visible_tokens", "nfe", "tokens_per_forward", "rows_per_forward", "equal_requests", "seconds"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from remask.cli import main; main()", "bench", "throughput", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "200"}
    )


def test_the_mixed_workload_is_seeded_and_mixed(golden_llm: LLM, golden_model: TransformerDenoiser) -> None:
    jobs = workloads.mixed(golden_llm.tokenizer, golden_model.config, 60)
    assert jobs == workloads.mixed(golden_llm.tokenizer, golden_model.config, 60)
    assert jobs[:7] == workloads.mixed(golden_llm.tokenizer, golden_model.config, 7)
    assert {job.params.max_tokens for job in jobs} == {16, 32, 64}
    assert {job.params.block_length for job in jobs} == {8, 16, 32}
    assert len({(str(job.params.unmask).split(":")[0], job.params.remask) for job in jobs}) == 3
    lens = [len(job.prompt) for job in jobs]
    assert min(lens) >= 16
    assert max(lens) <= 128
    assert len(set(lens)) > 20
    assert not {0, 1, 2} & {token for job in jobs for token in job.prompt}, "no special ids"


def test_the_command_measures_the_embedded_model_on_puzzles(tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.json"
    run = bench(
        "--model", "tiny", "--workload", "tiny", "--num-requests", "5", "--repetitions", "2",
        "--dtype", "float32", "--output", str(output),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    assert report["environment"]["threads"] == 1
    assert list(report["results"]) == ["plain loop, float32", "static batch, float32", "engine, float32"]
    for name, result in report["results"].items():
        assert name in run.stdout
        assert set(result) >= VLLM_KEYS | OWN_KEYS
        assert result["equal_requests"] == result["num_requests"] == 5
        assert result["solved"] >= 4
        assert result["visible_tokens"] == 2 * 16 + 2 * 36 + 4, "end-of-text tokens are not counted"
        assert result["total_num_tokens"] == 2 * (16 + 17) + 2 * (36 + 37) + (4 + 8)
        assert len(result["seconds"]) == 2
        times, seconds = result["times_as_fast"], result["elapsed_time"]
        assert times["min"] <= times["median"] <= times["max"]
        assert result["tokens_per_second"] == pytest.approx(result["total_num_tokens"] / seconds, rel=0.01)
    engine = report["results"]["engine, float32"]
    assert 0 < engine["gemm_utilization"]["median"] < 1
    assert len(engine["gemm_gflop_per_second"]) == 2


def test_a_difference_would_show(golden_model: TransformerDenoiser, golden_llm: LLM) -> None:
    jobs = workloads.mixed(golden_llm.tokenizer, golden_model.config, 3)
    baseline, engine = (
        throughput.Decoder(throughput.plain_loop_decoder(golden_model)),
        throughput.Decoder(throughput.engine_decoder(golden_llm), golden_model),
    )
    for decoder in (baseline, engine):
        decoder.repeat(jobs)
    first, *others = engine.written
    engine.written = [Decoded([5, *first.token_ids[1:]], first.nfe), *others]
    results: dict[str, Any] = throughput._results({"a": baseline, "b": engine}, jobs, (1,), None)
    assert (results["a"]["equal_requests"], results["b"]["equal_requests"]) == (3, 2)
    assert results["a"]["rows_per_forward"] < results["b"]["rows_per_forward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny", "--workload", "mixt"), "workload: unknown; did you mean 'mixed'?"),
        (("--num-requests", "0"), "num_requests: must be at least 1"),
        (("--repetitions", "-1"), "repetitions: must be at least 1"),
        (("--model", "/nonexistent"), "model: is not a directory"),
        (("--dtype", "int3"), "dtype: use one of float32, bfloat16"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    run = bench(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_puzzles_need_a_tokenizer(golden_llm: LLM, golden_model: TransformerDenoiser) -> None:
    with pytest.raises(InvalidRequest, match="give a model with a tokenizer"):
        workloads.workload("tiny", golden_llm.tokenizer, golden_model.config, 2)
