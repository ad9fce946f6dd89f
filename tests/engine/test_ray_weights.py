"""Weights that are replaced on Ray: workers that die in between come back with those that the engine has."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file
from versions import PROMPTS, SAMPLING, llm_of, tokens_of, write_versions, written_by

from remask import LLM, InvalidRequest
from remask.workers.executors import ray_weights
from remask.workers.executors.ray_executor import RayExecutor
from remask.workers.startup import host_memory

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def versions(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_versions(golden_checkpoint, tmp_path_factory.mktemp("weights"), 2)


@pytest.fixture(scope="module")
def expected(versions: list[Path]) -> list[Any]:
    return written_by(versions)


@pytest.fixture(scope="module", params=["auto", "object_store"])
def llm(cluster: None, versions: list[Path], request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = {"distributed_executor_backend": "ray", "data_parallel_size": 2, "load_format": request.param}
    with llm_of(versions[0], **options) as llm:
        yield llm


def executor_of(llm: LLM) -> RayExecutor:
    executor = llm.engine._engine.executor
    assert isinstance(executor, RayExecutor)
    return executor


def kill_one(llm: LLM) -> None:
    """Kills a worker's process."""
    pool = executor_of(llm)._pool
    held = next(iter(pool.held.values()))
    ray.kill(held.actor, no_restart=True)


def wait_for_workers(llm: LLM, *others: int) -> None:
    """Waits for two workers that are none of these."""
    deadline = time.monotonic() + 60
    while len(set(executor_of(llm).workers) - set(others)) < 2:
        assert time.monotonic() < deadline
        llm.generate(PROMPTS[0], {"max_tokens": 1}, use_tqdm=False)


@pytest.mark.parametrize("given", ["directory", "tensors", "reference"])
def test_all_workers_get_the_weights_and_so_do_those_that_start_later(
    llm: LLM, versions: list[Path], expected: list[Any], given: str
) -> None:
    for version in (1, 0):
        weights: Any = versions[version]
        if given != "directory":
            weights = load_file(versions[version] / "model.safetensors")
        if given == "reference":
            weights = ray.put(weights)
        llm.update_weights(weights)
        del weights
        assert tokens_of(llm) == expected[version]
        if version == 1:
            old = list(executor_of(llm).workers)
            llm.scale(1)
            while len(executor_of(llm).workers) > 1:
                tokens_of(llm)
            kill_one(llm)
            llm.scale(2)
            wait_for_workers(llm, *old)
            assert tokens_of(llm) == expected[version]


@pytest.mark.parametrize("moment", ["while they read", "when they have read", "when they swap"])
def test_a_worker_that_dies_meanwhile_comes_back_with_what_the_engine_has(
    llm: LLM, versions: list[Path], expected: list[Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ray_weights.RayWeights._ask

    def asking(own: Any, held: Any, method: str, *args: Any) -> Any:
        if (method, moment) in (("stage", "while they read"), ("swap", "when they swap")):
            kill_one(llm)
        found = ask(own, held, method, *args)
        if (method, moment) == ("stage", "when they have read"):
            kill_one(llm)
        return found

    wait_for_workers(llm)
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(ray_weights.RayWeights, "_ask", asking)
        ends = threading.Event()

        def load() -> list[tuple[int, Any]]:
            found: list[tuple[int, Any]] = []
            while not ends.is_set():
                outputs = llm.generate(PROMPTS, SAMPLING, use_tqdm=False)
                assert {output.error for output in outputs} == {None}
                found += [
                    (output.weights_version, [sample.token_ids for sample in output.outputs])
                    for output in outputs
                ]
            return found

        asked = threads.submit(load)
        try:
            version = llm.update_weights(versions[1])
        finally:
            ends.set()
        for position, (number, tokens) in enumerate(asked.result()):
            assert tokens == expected[number == version][position % len(PROMPTS)]
    wait_for_workers(llm)
    assert tokens_of(llm) == expected[1]
    llm.update_weights(versions[0])
    assert tokens_of(llm) == expected[0]


def test_what_one_worker_refuses_none_takes(llm: LLM, versions: list[Path], expected: list[Any]) -> None:
    wait_for_workers(llm)
    with pytest.raises(InvalidRequest, match="family is 'Dream', not 'LLaDA'"):
        llm.update_weights(versions[0].parent / "dream-tiny")
    assert tokens_of(llm) == expected[0]


def test_the_workers_of_a_node_must_fit_its_memory_together(
    llm: LLM, versions: list[Path], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_workers(llm)
    size = executor_of(llm).facts.weight_bytes
    assert size is not None
    sizes: list[int] = []

    def check_room(num_bytes: int, available: int | None, weights: object, where: str = "") -> None:
        assert available is not None
        sizes.append(num_bytes)
        if where:
            host_memory.check_room(num_bytes, num_bytes - 1, weights, where)

    monkeypatch.setattr(ray_weights, "check_room", check_room)
    with pytest.raises(InvalidRequest, match=r"and node \w+ has 0.0\d GB free; free memory"):
        llm.update_weights(versions[1])
    shares = executor_of(llm)._weights._setup.load_format == "object_store"
    assert sizes == ([2 * size, size] if shares else [2 * size])
    assert tokens_of(llm) == expected[0]
