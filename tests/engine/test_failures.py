"""Requests that fail: each ends with what happened, and no other request is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remask import LLM, AsyncLLM, EngineDead, RequestFailed, RequestTooLarge, SamplingParams
from remask.scheduler.blame import MAX_ACCUSED
from remask.scheduler.messages import StepBatch
from remask.workers.worker import Launched, NotRun, Worker

PROMPTS = [[5 + i, 11, 7] for i in range(6)]
BAD_SEED = 4711


@pytest.fixture
def llm(golden_checkpoint: Path) -> Iterator[LLM]:
    with LLM(golden_checkpoint, dtype="float32", device="cpu", max_num_rows=4096) as llm:
        yield llm


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Bursts with a canvas of `BAD_SEED` raise `error`, or all if `always`."""
    failure: dict[str, Any] = {"error": ValueError("a kernel raised"), "always": False, "bursts": 0}
    launch = Worker._launch

    def broken(self: Worker, batch: StepBatch) -> Launched | NotRun:
        failure["bursts"] += 1
        if failure["always"] or any(spec.seed == BAD_SEED for spec in batch.specs):
            raise failure["error"]
        return launch(self, batch)

    monkeypatch.setattr(Worker, "_launch", broken)
    return failure


def params(*bad: int, count: int = len(PROMPTS)) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=12, seed=BAD_SEED if i in bad else i) for i in range(count)]


@pytest.mark.parametrize("bad", [(0,), (3,), (1, 2, 5)], ids=str)
def test_a_request_that_raises_ends_and_no_other_is_touched(
    llm: LLM, raising: dict[str, Any], bad: tuple[int, ...]
) -> None:
    outputs = llm.generate(PROMPTS, params(*bad))
    raising["error"] = None
    clean = [llm.generate(prompt, each)[0] for prompt, each in zip(PROMPTS, params(), strict=True)]
    for i, (output, expected) in enumerate(zip(outputs, clean, strict=True)):
        if i in bad:
            assert (output.finished, output.error_type, output.error_status) == (False, "RequestFailed", 500)
            assert output.error is not None
            assert "ValueError: a kernel raised" in output.error
            assert output.outputs[0].finish_reason == "error"
        else:
            assert output.error is None
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_request_that_fails_alone_before_any_forward_ends_with_its_error(
    llm: LLM, raising: dict[str, Any]
) -> None:
    (output,) = llm.generate([PROMPTS[0]], params(0, count=1))
    assert output.error_type == "RequestFailed"
    assert output.outputs[0].nfe == 0
    assert llm.generate([PROMPTS[1]], params(count=1))[0].error is None, "and the engine goes on"


def test_a_request_that_does_not_fit_alone_is_tried_twice(llm: LLM, raising: dict[str, Any]) -> None:
    raising["error"] = torch.OutOfMemoryError("CUDA out of memory")
    (output,) = llm.generate([PROMPTS[0]], params(0, count=1))
    assert (output.error_type, output.error_status) == ("RequestTooLarge", 413)
    assert raising["bursts"] == 2


def test_if_every_burst_raises_the_engine_is_dead_with_that_error(llm: LLM, raising: dict[str, Any]) -> None:
    raising["always"] = True
    with pytest.raises(EngineDead, match="every burst fails with ValueError: a kernel raised"):
        llm.generate(PROMPTS * 2, params(count=2 * len(PROMPTS)))
    assert 2 * len(PROMPTS) > MAX_ACCUSED
    with pytest.raises(EngineDead):
        llm.generate(PROMPTS)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("a kernel raised"), RequestFailed), (MemoryError(), RequestTooLarge)],
    ids=str,
)
def test_an_async_engine_raises_what_happened_and_serves_the_others(
    golden_checkpoint: Path, raising: dict[str, Any], error: Exception, kind: type[Exception]
) -> None:
    raising["error"] = error

    async def one(llm: AsyncLLM, i: int, each: SamplingParams) -> str:
        async for output in llm.generate(PROMPTS[i], each):
            return str(output.outputs[0].finish_reason)
        raise AssertionError("there is an output")

    async def work() -> list[Any]:
        async with AsyncLLM(golden_checkpoint, dtype="float32", device="cpu", max_num_rows=4096) as llm:
            tasks = (one(llm, i, each) for i, each in enumerate(params(2)))
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(work())
    assert isinstance(results[2], kind)
    assert all(result in ("stop", "length") for i, result in enumerate(results) if i != 2)
