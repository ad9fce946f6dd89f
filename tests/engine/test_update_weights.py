"""Weights that are replaced while requests run: each output has the version that wrote it, and its text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import PROMPTS, SAMPLING, llm_of, tensors_of, tokens_of, write_versions, written_by

from remask import LLM, AsyncLLM, EngineDead, InvalidRequest
from remask.benchmarks import exactness
from remask.workers.executors import in_process
from remask.workers.models.markov import write_markov
from remask.workers.startup import host_memory
from remask.workers.worker import Worker


@pytest.fixture(scope="module")
def versions(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_versions(golden_checkpoint, tmp_path_factory.mktemp("weights"), 3)


@pytest.fixture(scope="module")
def expected(versions: list[Path]) -> list[Any]:
    return written_by(versions)


@pytest.fixture
def llm(versions: list[Path]) -> Iterator[LLM]:
    with llm_of(versions[0]) as llm:
        yield llm


GIVEN: dict[str, Callable[[Path, dict[str, torch.Tensor]], Any]] = {
    "text": lambda directory, tensors: str(directory),
    "path": lambda directory, tensors: directory,
    "tensors": lambda directory, tensors: tensors,
    "arrays": lambda directory, tensors: {name: own.float().numpy() for name, own in tensors.items()},
}


@pytest.mark.parametrize("given", GIVEN)
def test_new_weights_write_what_an_engine_that_starts_with_them_writes(
    llm: LLM, versions: list[Path], expected: list[Any], given: str
) -> None:
    assert tokens_of(llm) == expected[0]
    for version in (1, 2):
        weights = GIVEN[given](versions[version], tensors_of(versions[0], version))
        assert llm.update_weights(weights) == version
        assert tokens_of(llm) == expected[version]
        (output,) = llm.generate([PROMPTS[0]], SAMPLING, use_tqdm=False)
        assert output.weights_version == version


def test_every_output_under_load_has_a_version_and_its_text(
    llm: LLM, versions: list[Path], expected: list[Any]
) -> None:
    ends = threading.Event()

    def ask(_: int) -> list[tuple[int, Any]]:
        found = []
        while not ends.is_set():
            outputs = llm.generate(PROMPTS, SAMPLING, use_tqdm=False)
            assert all(output.finished for output in outputs)
            found += [
                (output.weights_version, index, [sample.token_ids for sample in output.outputs])
                for index, output in enumerate(outputs)
            ]
        return found

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask, number) for number in range(4)]
        try:
            for version in (1, 2):
                assert llm.update_weights(versions[version]) == version
            assert tokens_of(llm) == expected[2]
        finally:
            ends.set()
        found = [answer for future in asked for answer in future.result()]
    assert {version for version, _, _ in found} == {0, 1, 2}
    for version, index, tokens in found:
        assert tokens == expected[version][index]


def test_what_has_started_ends_on_its_weights_and_what_waits_starts_on_the_new_ones(
    versions: list[Path], expected: list[Any]
) -> None:
    async def run() -> None:
        async with AsyncLLM(
            versions[0], device="cpu", max_num_rows=512, batch_invariant=True, burst=1
        ) as llm:
            stream = llm.generate(PROMPTS[0], {**SAMPLING, "n": 1}, output_kind="cumulative")
            first = await anext(stream)
            assert first.weights_version == 0
            update = asyncio.create_task(llm.update_weights(versions[1]))
            while not llm.engine._engine._scheduler._holds:  # type: ignore[attr-defined]
                await asyncio.sleep(0)
            waits = llm.generate(PROMPTS[1], SAMPLING)
            last = [output async for output in stream][-1]
            assert await update == 1
            assert last.weights_version == 0
            assert last.outputs[0].token_ids == expected[0][0][0]
            (output,) = [output async for output in waits]
            assert output.weights_version == 1
            assert [sample.token_ids for sample in output.outputs] == expected[1][1]

    asyncio.run(run())


def test_keys_that_the_old_weights_made_are_forgotten(llm: LLM, versions: list[Path]) -> None:
    with llm_of(versions[1]) as other:
        expected = tokens_of(other, reuse="both")
    assert tokens_of(llm, reuse="both") != expected
    llm.update_weights(versions[1])
    assert tokens_of(llm, reuse="both") == expected


def test_keys_of_an_aborted_request_do_not_outlive_its_weights(versions: list[Path]) -> None:
    async def run() -> None:
        async with AsyncLLM(versions[0], device="cpu", max_num_rows=512, burst=1) as llm:
            params = {"max_tokens": 32, "block_length": 16, "unmask": "schedule", "reuse": "both"}
            stream = llm.generate(PROMPTS[0], params, output_kind="cumulative", canvas_events=True)
            for _ in range(4):
                await anext(stream)
            await stream.aclose()
            store = llm.engine._engine.executor._worker._store  # type: ignore[attr-defined]
            while llm.engine.num_live or store._used:
                await asyncio.sleep(0.01)
            assert not store.is_empty, "the keys of the aborted canvas are kept"
            await llm.update_weights(versions[1])
            assert store.is_empty

    asyncio.run(run())


def test_fp8_is_quantized_again(versions: list[Path]) -> None:
    options = {"dtype": "bfloat16", "quantization": "fp8"}
    with llm_of(versions[1], **options) as other, llm_of(versions[0], **options) as llm:
        assert tokens_of(llm) != tokens_of(other)
        llm.update_weights(versions[1])
        assert tokens_of(llm) == tokens_of(other)


def test_tensors_are_rounded_to_the_dtype_that_runs(versions: list[Path]) -> None:
    with llm_of(versions[1], dtype="bfloat16") as other, llm_of(versions[0], dtype="bfloat16") as llm:
        llm.update_weights(tensors_of(versions[0], 1))
        assert tokens_of(llm) == tokens_of(other)


def without(tensors: dict[str, Any], name: str, **others: Any) -> dict[str, Any]:
    return {key: own for key, own in tensors.items() if key != name} | others


EMBEDDING = "model.transformer.wte.weight"
BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no directory": (lambda tensors: "/nowhere", "is not a directory"),
    "another family": (lambda tensors: "dream-tiny", "is another model than the one that runs: .*family is"),
    "a tensor is missing": (lambda tensors: without(tensors, EMBEDDING), f"missing tensors: {EMBEDDING}"),
    "one is unknown": (lambda tensors: {**tensors, "other": tensors[EMBEDDING]}, "unexpected tensors: other"),
    "another shape": (
        lambda tensors: {**tensors, EMBEDDING: tensors[EMBEDDING][:-1]},
        rf"wrong shapes: {EMBEDDING} is \(",
    ),
    "another type": (
        lambda tensors: {**tensors, EMBEDDING: tensors[EMBEDDING].long()},
        f"{EMBEDDING} is int64",
    ),
    "no tensor": (lambda tensors: {**tensors, EMBEDDING: "text"}, "is no tensor"),
    "no state dict": (lambda tensors: 3, "must be a checkpoint directory, a state dict, or Ray's reference"),
    "names that are no text": (lambda tensors: {1: tensors[EMBEDDING]}, "must be a checkpoint directory"),
}


@pytest.mark.parametrize("make", BAD)
def test_weights_of_another_model_are_refused_by_name_and_change_nothing(
    llm: LLM, versions: list[Path], expected: list[Any], make: str
) -> None:
    given, problem = BAD[make]
    weights = given(tensors_of(versions[0], 1))
    if weights == "dream-tiny":
        weights = versions[0].parent / weights
    with pytest.raises(InvalidRequest, match=problem) as caught:
        llm.update_weights(weights)
    assert caught.value.field.startswith("weights")
    assert tokens_of(llm) == expected[0]
    assert llm.update_weights(versions[1]) == 1


def test_what_the_host_cannot_hold_is_refused_before_anything_is_read(
    llm: LLM, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(in_process, "available_bytes", lambda: 1000)
    monkeypatch.setattr(Worker, "stage", lambda *arguments: reads.append(arguments))
    with pytest.raises(
        InvalidRequest, match=r"take 0.01 GB of host memory, and this machine has 0.00 GB free"
    ):
        llm.update_weights(versions[1])
    assert reads == []


def test_a_container_has_the_rest_of_its_own_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert host_memory.available_bytes(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert host_memory.available_bytes(meminfo, tmp_path) == 5000 * 1024
    for name, text in {
        "memory.max": "4000000\n",
        "memory.current": "3000000\n",
        "memory.stat": "anon 7\nactive_file 200\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert host_memory.available_bytes(meminfo, tmp_path) == 1000250
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_bytes(meminfo, tmp_path) == 5000 * 1024
    assert host_memory.available_bytes() != 0


def test_an_engine_that_is_closed_meanwhile_says_so(versions: list[Path]) -> None:
    llm = llm_of(versions[0], burst=1)
    with ThreadPoolExecutor(2) as threads:
        started = threading.Event()
        ask = threads.submit(
            llm.generate,
            PROMPTS[0],
            {"max_tokens": 400, "unmask": "schedule", "block_length": 1},
            use_tqdm=False,
            on_progress=lambda _: started.set(),
        )
        started.wait()
        update = threads.submit(llm.update_weights, versions[1])
        while not llm.engine._engine._scheduler._holds:
            pass
        llm.close()
        for future in (ask, update):
            with pytest.raises(EngineDead):
                future.result()
    with pytest.raises(EngineDead):
        llm.update_weights(versions[1])


def test_a_markov_chain_has_no_weights_to_replace(tmp_path: Path, versions: list[Path]) -> None:
    write_markov(tmp_path, exactness.INITIAL, exactness.TRANSITION)
    with LLM(tmp_path) as llm, pytest.raises(InvalidRequest, match="the model is no transformer"):
        llm.update_weights(versions[1])
