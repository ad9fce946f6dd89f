"""Engines in separate processes and clusters: model paths, full nodes, memory limits, and removed nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from remask import EngineOptions
from remask.engine import start_executor
from remask.workers.startup.setup import WorkerSetup

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_relative_model_path_is_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers run in folders of their own, such as the `working_dir` of a `runtime_env`."""

    def models_of(backend: str, executor: str) -> list[str]:
        setups: list[WorkerSetup] = []
        monkeypatch.setattr(executor, lambda setup, **_: setups.append(setup))
        options = EngineOptions.parse(model="model", distributed_executor_backend=backend)
        start_executor(options, Path("model"))
        return [setup.model for setup in setups]

    monkeypatch.chdir(tmp_path)
    on_ray = models_of("ray", "remask.workers.executors.ray_executor.RayExecutor")
    assert on_ray == [str(tmp_path / "model")]
    assert models_of("uni", "remask.engine.InProcessExecutor") == ["model"]


def test_a_cluster_that_has_no_room_any_more_is_unavailable() -> None:
    code = """
import atexit, threading, time, ray
from ray.cluster_utils import Cluster
import remask.workers.executors.ray_pool as module
from remask import LLM, Unavailable
module.STARVED_SECONDS = 2.0
health = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
atexit.register(cluster.shutdown)  # or its address stays where the next `ray.init` looks first
atexit.register(ray.shutdown)  # before that
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
llm = LLM("tiny", device="cpu", distributed_executor_backend="ray", max_num_rows=64, burst=1)
llm.generate("1+1=", {"max_tokens": 4})
threading.Timer(0.5, lambda: cluster.remove_node(node, allow_graceful=False)).start()
started = time.monotonic()
try:
    while True:
        llm.generate(["1+1="] * 8, {"max_tokens": 200, "unmask": "schedule"})
except Unavailable as error:
    print(error)
assert time.monotonic() - started < 100
try:
    llm.generate("1+1=")
except Unavailable:
    print("still")
llm.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the cluster has become too small for a worker" in done.stdout
    assert "still" in done.stdout


@pytest.mark.long
def test_a_worker_that_ray_kills_for_its_memory_costs_no_request(tmp_path: Path) -> None:
    """The first burst takes more memory than the node may use, and Ray's memory monitor ends its worker."""
    code = """
import sys, time
from pathlib import Path
import ray
import remask.workers.executors.ray_pool as module
from remask import LLM

lines = (line.split() for line in open("/proc/meminfo"))
memory = {name.rstrip(":"): 1024 * int(count) for name, count, *_ in lines}
total = memory["MemTotal"]
allowed = (total - memory["MemAvailable"] + 5e9) / total
ray.init(
    address="local",  # and no cluster that another test has left
    num_cpus=2,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=100_000_000,
    _system_config={"memory_usage_threshold": allowed, "memory_monitor_refresh_ms": 100},
)
marker = Path(sys.argv[1])

class Greedy(module.RemaskWorker):
    def run(self, number, batch):
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return super().run(number, batch)
        hoard = []
        while len(hoard) < 100:
            hoard.append(b"x" * 100_000_000)
            time.sleep(0.01)
        raise AssertionError("the worker was not ended")

prompts, params = ["1+1=", "12+12="] * 8, {"max_tokens": 8, "temperature": 1.0, "rank": "top", "seed": 3}
options = {"device": "cpu", "max_num_rows": 512, "batch_invariant": True}
with LLM("tiny", **options) as llm:
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
module.RemaskWorker = Greedy
with LLM("tiny", distributed_executor_backend="ray", data_parallel_size=2, **options) as llm:
    outputs = llm.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert marker.exists()
    print(llm.engine._engine.executor._pool.reason)
"""
    command = [sys.executable, "-c", code, tmp_path / "marker"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OutOfMemoryError" in done.stdout


@pytest.mark.long
def test_kills_and_removed_nodes_change_no_token(tmp_path: Path) -> None:
    """The chaos of `benchmarks/chaos.py`, shorter."""
    command = ["-m", "remask.benchmarks.chaos", "--requests", "60", "--seconds", "20", "--pause", "4"]
    output = tmp_path / "chaos.json"
    done = subprocess.run([sys.executable, *command, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert (results["missing_or_repeated"], results["changed"], results["actors_left"]) == (0, 0, 0)
    assert results["killed_workers"] >= 2
    assert results["removed_nodes"] >= 1
