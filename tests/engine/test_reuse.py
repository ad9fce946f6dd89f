"""Reused keys: the outputs of the published decoders with a cache, token by token, in any company."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import Case, canvas_of, check, check_packed, read

from remask import LLM, InvalidRequest, Schedule, Threshold
from remask.workers.models.markov import write_markov

REUSE = {"fastdllm_prefix_cache": "prefix", "fastdllm_dual_cache": "both"}


def _case(golden: dict[str, Any]) -> Case:
    own = golden["params"]
    unmask = Threshold(own["threshold"]) if "threshold" in own else Schedule(own["steps"])
    return Case(golden, {**canvas_of(golden), "unmask": unmask, "reuse": REUSE[golden["policy"]]})


CASES = [_case(golden) for golden in read("llada_cache_decoding")["cases"]]


@pytest.mark.slow
def test_the_cases_tell_a_cache_from_none(golden_llm: LLM) -> None:
    assert len(CASES) == 31
    exact = [{**case.fields, "reuse": None} for case in CASES]
    outputs = golden_llm.generate([case.golden["prompt"] for case in CASES], exact)
    differs = [o.outputs[0].token_ids != c.golden["output"] for o, c in zip(outputs, CASES, strict=True)]
    assert differs == [case.golden["differs_from_uncached"] for case in CASES]


def test_the_published_cases_in_one_call(golden_llm: LLM) -> None:
    check(golden_llm, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("max_num_rows", "burst"), [(1, 8), (300, 1), (900, 3)])
def test_the_published_cases_in_any_company(golden_checkpoint: Path, max_num_rows: int, burst: int) -> None:
    check_packed(golden_checkpoint, CASES, max_num_rows, burst=burst)


def test_an_output_tells_its_full_forwards(tiny_llm: LLM) -> None:
    fields = {"max_tokens": 24, "block_length": 8, "unmask": "schedule:12", "ignore_eos": True}
    kinds = [{}, {"reuse": "both"}, {"reuse": "prefix", "refresh": 2}, {"preset": "fast-dllm-dual"}]
    outputs = tiny_llm.generate(["12+34="] * 4, [{**fields, **own} for own in kinds])
    counts = [(o.outputs[0].nfe, o.outputs[0].num_full_forwards) for o in outputs]
    assert counts[:3] == [(12, 12), (12, 3), (12, 6)]
    assert counts[3][1] == 3, "one a block"
    rows = [output.outputs[0].num_query_rows for output in outputs]
    assert rows[1] < rows[2] < rows[0]


def test_what_keys_cannot_be_kept_for_runs_exactly(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"block_length": 8, "unmask": "schedule", "ignore_eos": True}
    asked = [{**fields, "max_tokens": size, "reuse": reuse} for size in (16, 64) for reuse in (None, "both")]
    with LLM("tiny", dtype="float32", device="cpu", max_num_rows=512) as llm:
        assert llm.engine._engine.executor.facts.max_key_rows > 1000
    with (
        LLM("tiny", dtype="float32", device="cpu", max_num_rows=512, max_key_bytes=1 << 19) as llm,
        caplog.at_level(logging.WARNING),
    ):
        outputs = llm.generate(["12+34="] * 4, asked)
    full = [output.outputs[0].num_full_forwards for output in outputs]
    assert full == [16, 2, 64, 64]
    assert outputs[2].outputs[0].token_ids == outputs[3].outputs[0].token_ids
    (line,) = [record.getMessage() for record in caplog.records]
    assert "runs without reuse" in line
    assert "max_key_bytes" in line


def test_a_model_without_keys_refuses_reuse_by_name(tmp_path: Path) -> None:
    write_markov(tmp_path, [0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    with LLM(tmp_path) as llm, pytest.raises(InvalidRequest, match="keep no keys") as caught:
        llm.generate([[0, 1]], {"max_tokens": 8, "reuse": "both"})
    assert caught.value.parameter == "prompt 0: reuse"


def test_company_and_bursts_change_no_bit(golden_checkpoint: Path) -> None:
    cases, found = CASES[::4], list[list[Any]]()
    for max_num_rows, burst in ((1, 2), (600, 5)):
        options: dict[str, Any] = {"max_num_rows": max_num_rows, "burst": burst, "batch_invariant": True}
        with LLM(golden_checkpoint, dtype="float32", device="cpu", **options) as llm:
            prompts, fields = [c.golden["prompt"] for c in cases], [c.fields for c in cases]
            outputs = llm.generate(prompts, fields)
        found.append([(o.outputs[0].token_ids, o.outputs[0].confidences) for o in outputs])
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_the_same(golden_checkpoint: Path) -> None:
    check_packed(golden_checkpoint, CASES, max_num_rows=900, device="cuda")


@pytest.mark.slow
@pytest.mark.ray
def test_the_published_cases_on_two_workers_of_which_one_is_killed(golden_checkpoint: Path) -> None:
    import ray

    from remask.benchmarks import chaos

    options: dict[str, Any] = {
        "distributed_executor_backend": "ray",
        "data_parallel_size": 2,
        "burst": 3,
        "max_num_rows": 700,
    }
    with LLM(golden_checkpoint, dtype="float32", device="cpu", **options) as llm:
        check(llm, CASES[:2])
        session = ray.get_runtime_context().get_session_name()
        victim, *_ = chaos.worker_processes(session)
        killer = threading.Timer(0.7, os.kill, [victim, signal.SIGKILL])
        killer.start()
        check(llm, CASES)
        killer.join()
        assert victim not in chaos.worker_processes(session)
