"""A guest on a cluster of several nodes: shared placement groups, namespaces, and code that a job brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from remask.scheduler.errors import InvalidRequest
from remask.workers.executors.ray_session import RaySession

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GUEST = """
import atexit, json, sys, time, ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from remask import LLM, InvalidRequest

OPTIONS = {"device": "cpu", "max_num_rows": 256, "distributed_executor_backend": "ray"}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
atexit.register(cluster.shutdown)  # or its address stays where the next `ray.init` looks first
atexit.register(ray.shutdown)  # before that
for _ in range(2):
    cluster.add_node(num_cpus=3)
runtime_env = {"py_modules": [sys.argv[1]]}
ray.init(address=cluster.address, namespace="host", log_to_driver=False, runtime_env=runtime_env)
facts = {}

@ray.remote(num_cpus=1)
class Host:
    def __init__(self, num_workers):
        self.llm = LLM("tiny", data_parallel_size=num_workers, **OPTIONS)
    def text(self):
        return self.llm.generate("123+456=", {"max_tokens": 8}, use_tqdm=False)[0].outputs[0].text
    def places(self):
        pool = self.llm.engine._engine.executor._pool
        code = ray.remote(num_cpus=0)(lambda: __import__("remask").__file__)
        nodes = [ray.get(held.actor.host_memory.remote())[0] for held in pool.held.values()]
        nodes.append(ray.get_runtime_context().get_node_id())
        return {"code": ray.get(code.remote()), "nodes": nodes}
    def more(self):
        try:
            self.llm.scale(3)
        except InvalidRequest as error:
            return str(error)

group = placement_group([{"CPU": 1}] * 5, strategy="SPREAD")
ray.get(group.ready())
strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
hosts = [Host.options(scheduling_strategy=strategy).remote(count) for count in (1, 2)]
facts["texts"] = ray.get([host.text.remote() for host in hosts])
facts["places"] = ray.get([host.places.remote() for host in hosts])
facts["free"] = ray.available_resources().get("CPU", 0)
facts["named"] = sorted({own["namespace"] for own in ray.util.list_named_actors(all_namespaces=True)})
facts["more"] = ray.get(hosts[0].more.remote())
for host in hosts:
    ray.kill(host)
deadline = time.monotonic() + 60
while (left := ray.util.list_named_actors(all_namespaces=True)) and time.monotonic() < deadline:
    time.sleep(0.2)
facts["left"] = left
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(wheel: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", GUEST, wheel]
    environment = {**os.environ, "PIP_NO_DEPS": "1"}  # the nodes have what remask needs
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=wheel.parent, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engines_in_actors_share_a_placement_group(facts: dict[str, Any]) -> None:
    assert facts["texts"] == ["0579", "0579"]
    nodes = [node for place in facts["places"] for node in place["nodes"]]
    assert len(nodes) == 3 + 2
    assert len(set(nodes)) == 2, "actors and workers fill bundles on two nodes"
    assert facts["free"] == 1, "all else is in the group"
    assert facts["more"].startswith("placement_group: 3 workers need a bundle of 1 CPUs")


def test_engines_stay_in_the_namespace_of_their_host(facts: dict[str, Any]) -> None:
    assert facts["named"] == ["host"]


def test_workers_run_the_code_that_the_job_brings(facts: dict[str, Any]) -> None:
    for place in facts["places"]:
        assert "py_modules" in place["code"]


def test_workers_end_with_the_actor_of_their_engine(facts: dict[str, Any]) -> None:
    assert facts["left"] == []


CLIENT = """
from ray.util.client import ray_client_helpers as helpers
from remask import LLM, InvalidRequest

with helpers.ray_start_client_server():
    try:
        LLM("tiny", device="cpu", distributed_executor_backend="ray")
    except InvalidRequest as error:
        print(error)
"""


def test_ray_clients_are_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "distributed_executor_backend: this process is a Ray Client (ray://)" in done.stdout


def test_the_address_of_a_client_is_refused_before_ray_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    # A client of another version fails to connect, after 30 seconds, and for reasons that do not name it.
    def init(**_: Any) -> None:
        raise AssertionError("Ray is not called")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(InvalidRequest, match=r"distributed_executor_backend: this process is a Ray Client"):
        RaySession()
