"""Workers on a real Ray cluster: kills change no text, and nothing is left on the cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray

from remask import LLM, InvalidRequest, SamplingParams
from remask.benchmarks import chaos
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.executors.ray_actor import RemaskWorker
from remask.workers.executors.ray_executor import RayExecutor
from remask.workers.executors.ray_pool import WorkerPool

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = ["123+456=", "111+222=", "12..34..2.4.43.1=", "999+1="]
ASKS: list[dict[str, Any]] = [
    {"max_tokens": 12, "unmask": "schedule", "temperature": 1.0, "rank": "top", "seed": 1},
    {"max_tokens": 40, "block_length": 8, "remask": "wino", "temperature": 0.7, "seed": 2},
    {"max_tokens": 20, "remask": "saber", "temperature": 1.0, "seed": 3, "trace": True},
    {"max_tokens": 30, "unmask": "dream:alg=origin", "temperature": 1.0, "seed": 4, "logprobs": 1},
]


@pytest.fixture(scope="module")
def workload() -> tuple[list[str], list[dict[str, Any]]]:
    count = 40
    params = [{**ASKS[i % 4], "seed": i} for i in range(count)]
    return [PROMPTS[i % 4] for i in range(count)], params


@pytest.fixture(scope="module")
def expected(workload: Any) -> list[Any]:
    with LLM("tiny", device="cpu", max_num_rows=512, batch_invariant=True) as llm:
        return results_of(llm.generate(*workload))


def results_of(outputs: list[Any]) -> list[Any]:
    return [
        (o.outputs[0].token_ids, o.outputs[0].nfe, o.outputs[0].confidences, o.outputs[0].trace, o.error)
        for o in outputs
    ]


def on_ray(**options: Any) -> LLM:
    defaults = {"max_num_rows": 512, "batch_invariant": True, "burst": 2, "data_parallel_size": 2}
    return LLM("tiny", device="cpu", distributed_executor_backend="ray", **{**defaults, **options})


def pids(llm: LLM) -> list[int]:
    """Process ids of the workers that are up."""
    executor = llm.engine._engine.executor
    assert isinstance(executor, RayExecutor)
    actors = [executor._pool.held[number].actor for number in executor.workers]
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])


def worker_processes() -> list[int]:
    return chaos.worker_processes(ray.get_runtime_context().get_session_name())


def living() -> list[str]:
    """Names of our actors that are alive on the cluster."""
    return [name for name in ray.util.list_named_actors() if name.startswith("RemaskWorker-")]


def test_workers_that_are_killed_cost_no_request_and_no_bit(
    cluster: None, workload: Any, expected: Any
) -> None:
    with on_ray(burst=1) as llm:
        llm.generate(PROMPTS[0])
        stop = threading.Event()
        killed: list[int] = []

        def kill() -> None:
            while not stop.wait(0.4) and len(killed) < 4:
                victims = [pid for pid in worker_processes() if pid not in killed]
                if victims:
                    os.kill(victims[0], signal.SIGKILL)
                    killed.append(victims[0])

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            outputs = results_of(llm.generate(*workload))
            while len(killed) < 2:
                assert results_of(llm.generate(*workload)) == expected
        finally:
            stop.set()
            killer.join()
        assert outputs == expected
        llm.generate(PROMPTS)  # it goes on
    assert living() == []


def test_a_request_that_kills_workers_ends_with_an_error_and_harms_no_other(
    cluster: None, workload: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import remask.workers.executors.ray_pool as module

    class Mortal(RemaskWorker):
        def run(self, number: int, batch: bytes) -> bytes:
            if b"\xf1\xd2\xb3\x44" in batch:  # the poisonous request's seed, on the wire
                os._exit(1)
            return super().run(number, batch)

    monkeypatch.setattr(module, "RemaskWorker", Mortal)
    prompts, params = workload
    poison = {"max_tokens": 8, "seed": 0x71F1D2B344, "unmask": "schedule"}
    with on_ray() as llm:
        outputs = llm.generate([*prompts[:8], "1+1="], [*params[:8], poison])
        assert results_of(outputs[:8]) == expected[:8]
        (sample,) = outputs[8].outputs
        assert (outputs[8].finished, sample.finish_reason, sample.token_ids) == (False, "error", [])
        assert "3 workers in a row died" in (outputs[8].error or "")
    assert living() == []


def test_a_worker_that_stalls_is_replaced(
    cluster: None, workload: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remask.workers.executors.ray_pool.PING_SECONDS", 0.2)
    monkeypatch.setattr("remask.workers.executors.ray_pool.STALL_SECONDS", 2.0)
    with on_ray(burst=1, data_parallel_size=1) as llm:
        llm.generate(PROMPTS[0])
        os.kill(pids(llm)[0], signal.SIGSTOP)
        assert results_of(llm.generate(*workload)) == expected
        executor = llm.engine._engine.executor
        assert isinstance(executor, RayExecutor)
        assert executor._pool.reason == "timeout: it answered no heartbeat within 2 s"
    assert living() == []


def test_workers_come_and_go_while_requests_run(cluster: None, workload: Any, expected: Any) -> None:
    with on_ray(data_parallel_size=1, burst=1) as llm:
        llm.generate(PROMPTS[0])
        numbers = []

        def scale() -> None:
            for count in (3, 1, 2):
                time.sleep(0.7)
                llm.scale(count)
                numbers.append(count)

        scaler = threading.Thread(target=scale)
        scaler.start()
        while scaler.is_alive():
            assert results_of(llm.generate(*workload)) == expected
        scaler.join()
        deadline = time.monotonic() + 60
        while len(living()) != 2 and time.monotonic() < deadline:
            time.sleep(0.1)  # the engine is idle
        assert (len(living()), numbers) == (2, [3, 1, 2])
    assert living() == []


@pytest.mark.parametrize(
    ("options", "named", "fix"),
    [
        ({"data_parallel_size": 50}, "num_cpus_per_worker", "50 workers need 50 CPUs; "),
        ({"num_gpus_per_worker": 1}, "num_gpus_per_worker", "2 workers need 2 GPUs; 0 of the cluster's 0"),
        ({"data_parallel_size": 0}, "data_parallel_size", "positive integer"),
        ({"device": "cuda"}, "num_gpus_per_worker", "2 workers need 2 GPUs; 0 of the cluster's 0"),
        (
            {"device": "cuda", "num_gpus_per_worker": 0, "data_parallel_size": 1},
            "worker 0: device",
            "torch sees 0 GPUs",
        ),
        ({"num_gpus_per_worker": -1}, "num_gpus_per_worker", "0 or more"),
        ({"num_gpus_per_worker": 1.5}, "num_gpus_per_worker", "a whole number, or a share of a GPU below 1"),
        ({"num_gpus_per_worker": float("nan")}, "num_gpus_per_worker", "a whole number"),
        ({"placement_group": "mine"}, "placement_group", "give what `ray.util.placement_group` returns"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name_and_leave_no_actor(
    cluster: None, options: dict[str, Any], named: str, fix: str
) -> None:
    defaults = {"model": "tiny", "device": "cpu", "max_num_rows": 512, "data_parallel_size": 2}
    with pytest.raises(InvalidRequest) as caught:
        LLM(distributed_executor_backend="ray", **{**defaults, **options})
    assert re.fullmatch(named, caught.value.parameter)
    assert fix in str(caught.value)
    assert living() == []


def test_a_checkpoint_that_one_node_lacks_is_refused(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import remask.workers.executors.ray_pool as module

    class Elsewhere(RemaskWorker):
        """The second that starts is on a node without the files."""

        def start(self, setup: bytes, weights: Any) -> bytes:
            try:
                (tmp_path / "first").touch(exist_ok=False)
            except FileExistsError:
                setup = setup.replace(b"tiny", b"gone")
            return super().start(setup, weights)

    monkeypatch.setattr(module, "RemaskWorker", Elsewhere)
    with pytest.raises(InvalidRequest, match=r"worker \d: model: is not a directory"):
        on_ray()
    assert living() == []


def test_a_placement_group_with_too_few_bundles_is_refused(cluster: None) -> None:
    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready())
    with pytest.raises(InvalidRequest, match="placement_group: 2 workers need a bundle of 1 CPUs"):
        on_ray(placement_group=group)
    with on_ray(placement_group=group, data_parallel_size=1) as llm:
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=4))
        assert len(living()) == 1
    states = ray.util.placement_group_table(group)
    assert states["state"] == "CREATED", "it is the caller's"
    ray.util.remove_placement_group(group)


def test_a_burst_is_launched_in_its_turn_and_before_the_result_of_the_last_one_is_read() -> None:
    class Overlapping:
        """A worker whose first burst ends when the second has been launched."""

        def __init__(self) -> None:
            self.launched: list[int] = []
            self.second = threading.Event()

        def launch(self, batch: StepBatch) -> int:
            self.launched.append(batch.burst_id)
            if batch.burst_id == 1:
                self.second.set()
            if batch.burst_id == 2:
                raise ZeroDivisionError
            return batch.burst_id

        def collect(self, burst_id: int) -> StepResult:
            assert self.second.wait(20)
            return StepResult(burst_id=burst_id, states=[], num_rows=0, seconds=0.0)

    actor, worker = RemaskWorker(1), Overlapping()
    actor._worker = worker  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as threads:
        bursts = [
            threads.submit(
                actor.run,
                i,
                msgspec.msgpack.encode(StepBatch(burst_id=i, num_steps=1, specs=[], states=[])),
            )
            for i in (3, 1, 2, 0)
        ]
        errors = [burst.exception() for burst in bursts]
    assert worker.launched == [0, 1, 2, 3]
    assert [type(error) for error in errors] == [type(None), type(None), ZeroDivisionError, type(None)]
    for i, burst in zip((3, 1, 0), (bursts[0], bursts[1], bursts[3]), strict=True):
        assert msgspec.msgpack.decode(burst.result(), type=StepResult).burst_id == i


def test_two_engines_on_one_cluster_do_not_meet(cluster: None, workload: Any, expected: Any) -> None:
    prompts, params = workload
    with on_ray(data_parallel_size=1) as first, on_ray(data_parallel_size=1) as second:
        assert results_of(first.generate(prompts[:8], params[:8])) == expected[:8]
        first.close()
        assert results_of(second.generate(prompts[:8], params[:8])) == expected[:8]
        assert len(living()) == 1
    assert living() == []


def test_an_async_actor_embeds_an_engine_that_has_workers_of_its_own(
    cluster: None, expected: Any, workload: Any
) -> None:
    prompts, params = workload

    @ray.remote(num_cpus=0)
    class Host:
        async def answer(self, count: int) -> list[Any]:
            import asyncio

            from remask import AsyncLLM

            engine = await AsyncLLM.start(
                "tiny",
                device="cpu",
                max_num_rows=512,
                batch_invariant=True,
                distributed_executor_backend="ray",
            )

            async def one(i: int) -> Any:
                (output,) = [output async for output in engine.generate(prompts[i], params[i])]
                return (output.outputs[0].token_ids, output.outputs[0].nfe)

            async with engine:
                return await asyncio.gather(*(one(i) for i in range(count)))

    host = Host.remote()
    assert ray.get(host.answer.remote(8)) == [entry[:2] for entry in expected[:8]]
    assert living() == []
    ray.kill(host)


def test_workers_die_with_their_driver(cluster: None) -> None:
    code = f"""
import os, ray
from remask import LLM
ray.init(address={ray.get_runtime_context().gcs_address!r}, log_to_driver=False, namespace="crash")
llm = LLM("tiny", device="cpu", distributed_executor_backend="ray", max_num_rows=512)
llm.generate("1+1=", {{"max_tokens": 4}})
print("up", flush=True)
os._exit(9)
"""
    before = set(worker_processes())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (9, "up\n"), done.stderr
    deadline = time.monotonic() + 30
    while set(worker_processes()) - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert set(worker_processes()) <= before


def test_weights_through_the_object_store_are_those_of_the_files_and_nothing_is_left(
    cluster: None, workload: Any, expected: Any
) -> None:
    nothing = {"free": {"CPU": 4.0, "GPU": 0}, "actors": [], "groups": [], "processes": [], "store": 0.0}
    assert settled(nothing) == nothing, "what came before is gone"
    with on_ray(load_format="object_store") as llm:
        assert llm.engine._engine.executor.max_num_rows == 512, "as was said, and not measured"
        assert results_of(llm.generate(*workload)) == expected
        now = footprint()
        assert len(now["actors"]) == 2
        assert now["store"] > 5e6, "the weights, once"
        os.kill(pids(llm)[0], signal.SIGKILL)
        assert results_of(llm.generate(*workload)) == expected, "and of a worker that comes later"
    assert settled(nothing) == nothing


def settled(wanted: dict[str, Any]) -> dict[str, Any]:
    """The cluster's footprint, once it equals `wanted` or after 30 seconds."""
    deadline = time.monotonic() + 30
    while (found := footprint()) != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def footprint() -> dict[str, Any]:
    """The cluster's free resources, actors, placement groups, worker processes and object store bytes."""
    groups = ray.util.placement_group_table()
    store = ray.cluster_resources()["object_store_memory"] - ray.available_resources().get(
        "object_store_memory", 0
    )
    return {
        "free": {kind: ray.available_resources().get(kind, 0) for kind in ("CPU", "GPU")},
        "actors": living(),
        "groups": [name for name, group in groups.items() if group["state"] == "CREATED"],
        "processes": worker_processes(),
        "store": store,
    }


def test_one_worker_measures_the_knee_for_all(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    measure = WorkerPool.measure_knee

    def counted(pool: WorkerPool) -> int:
        assert len(pool.workers) == 2, "the others have loaded and wait"
        asked.append(measure(pool))
        return asked[-1]

    monkeypatch.setattr(WorkerPool, "measure_knee", counted)
    options: dict[str, Any] = {"distributed_executor_backend": "ray", "data_parallel_size": 2}
    with LLM(golden_checkpoint, device="cpu", **options) as llm:
        assert [llm.engine._engine.executor.max_num_rows] == asked, "once"
        assert asked[0] >= 64
