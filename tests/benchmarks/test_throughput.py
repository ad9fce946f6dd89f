"""The throughput and latency benchmarks: their workloads and figures, and `remask bench` as a process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from remask import LLM, InvalidRequest
from remask.benchmarks import latency, throughput, workloads
from remask.benchmarks.gpu import timing
from remask.benchmarks.plain_canvas import Decoded
from remask.cli.bench import measured
from remask.scheduler.messages import StepBatch
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Worker

Command = Callable[..., subprocess.CompletedProcess[str]]
VLLM_KEYS = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}
OWN_KEYS = {"visible_tokens", "nfe", "tokens_per_forward", "rows_per_forward", "equal_requests", "seconds"}


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


def test_the_command_measures_the_embedded_model_on_puzzles(
    remask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "new" / "report.json"
    run = remask(
        "bench", "throughput", "--model", "tiny", "--workload", "tiny", "--num-requests", "5",
        "--repetitions", "2", "--dtype", "float32", "--output", output,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    assert report["environment"]["threads"] == 1
    engines = ["engine, float32", "engine, float32, reuse=both"]
    assert list(report["results"]) == ["plain loop, float32", "static batch, float32", *engines]
    for name, result in report["results"].items():
        assert name in run.stdout
        assert set(result) >= VLLM_KEYS | OWN_KEYS
        assert result["num_requests"] == 5
        if not name.endswith("reuse=both"):
            assert result["equal_requests"] == 5
            assert result["solved"] >= 0.8
            assert result["visible_tokens"] == 2 * 16 + 2 * 36 + 4, "end-of-text tokens are not counted"
            assert result["total_num_tokens"] == 2 * (16 + 17) + 2 * (36 + 37) + (4 + 8)
        assert len(result["seconds"]) == 2
        times, seconds = result["times_as_fast"], result["elapsed_time"]
        assert times["min"] <= times["median"] <= times["max"]
        assert result["tokens_per_second"] == pytest.approx(result["total_num_tokens"] / seconds, rel=0.01)
    engine = report["results"]["engine, float32"]
    assert 0 < engine["gemm_utilization"]["median"] < 1
    assert len(engine["gemm_gflop_per_second"]) == 2
    reusing = report["results"]["engine, float32, reuse=both"]
    assert reusing["rows_per_forward"] < engine["rows_per_forward"], (
        "the canvases are blocks; prompts are kept"
    )


def test_a_difference_lowers_equal_requests(golden_model: TransformerDenoiser, golden_llm: LLM) -> None:
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
        (("--output", "/"), "output: cannot be written"),
        (("--output", "/dev/null/report.json"), "output: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    remask: Command, arguments: tuple[str, ...], message: str
) -> None:
    run = remask("bench", "throughput", *arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_an_interrupted_measurement_writes_and_prints_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def measure(keep: throughput.Keep) -> dict[str, Any]:
        def interrupted(report: dict[str, Any]) -> None:
            keep(report)
            raise KeyboardInterrupt

        return throughput.measure("tiny", "tiny", 3, 2, ["float32"], interrupted)

    with pytest.raises(KeyboardInterrupt):
        measured(measure, throughput.as_table, tmp_path / "report.json", json=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["notes"][0] == "Not finished: 1 of 2 repetitions."
    assert report["repetitions"] == len(report["results"]["engine, float32"]["seconds"]) == 1
    printed = capsys.readouterr().out
    assert "Not finished: 1 of 2 repetitions." in printed
    assert "engine, float32" in printed


@pytest.mark.parametrize(("batch_size", "baseline"), [(1, "plain loop"), (3, "static batch")])
def test_latency_is_that_of_the_last_answer_of_a_batch(batch_size: int, baseline: str) -> None:
    kept: list[dict[str, Any]] = []
    report = latency.measure("tiny", "tiny", batch_size, 3, 0, "float32", kept.append)
    assert [found["notes"][:1] for found in kept[:2]] == [
        [f"Not finished: {done} of 3 iterations."] for done in (1, 2)
    ]
    assert kept[-1] == report
    engine, other = report["results"]["engine"], report["results"][baseline]
    for result in (engine, other):
        assert len(result["latencies"]) == 3
        assert min(result["latencies"]) <= result["percentiles"]["50"] <= max(result["latencies"])
        assert result["solved"] == 1.0
        assert result["tokens_per_forward"] == round(result["visible_tokens"] / result["nfe"], 3)
    assert engine["nfe"] == other["nfe"]
    assert len(engine["gemm_gflop_per_second"]) == 3
    assert 0 < engine["gemm_utilization"]["median"] < 1


def test_what_is_not_counted_is_left_out(golden_model: TransformerDenoiser) -> None:
    """Packs with static shapes contain padding rows whose results are not read."""
    fixed = TransformerDenoiser(golden_model.model, SdpaAttention(), pack_rows=1 << 30, static_shapes=True)
    canvases = timing.canvases(golden_model.config, 2, 8, 16)
    batch = StepBatch(
        burst_id=0, num_steps=16, specs=[c.spec for c in canvases], states=[c.state for c in canvases]
    )

    def run(jobs: Sequence[workloads.Job]) -> list[Decoded]:
        Worker(fixed).run(batch)
        return [Decoded([5] * 16, 16)]

    jobs = workloads.fixed(None, golden_model.config, 1)
    decoder = throughput.Decoder(run, golden_model)
    decoder.repeat(jobs)
    assert (decoder.work.packs, decoder.work.flops, decoder.rates) == ([], 0, [])
    found = decoder.figures(jobs, [1], None)
    assert found == {"visible_tokens": 16, "nfe": 16, "tokens_per_forward": 1.0}
    assert decoder.work.figures(1.0, 1e9) == {}
    results = throughput._results(
        {"plain": throughput.Decoder(run, None, decoder.written, seconds=[1.0]), "engine": decoder},
        jobs,
        [1],
        None,
    )
    assert len(throughput.cells("engine", results["engine"])) == 8


def test_puzzles_need_a_tokenizer(golden_llm: LLM, golden_model: TransformerDenoiser) -> None:
    with pytest.raises(InvalidRequest, match="give a model with a tokenizer"):
        workloads.workload("tiny", golden_llm.tokenizer, golden_model.config, 2)
