"""What a cluster and a placement group have for workers, and what is refused before an actor waits for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import remask.workers.executors.ray_resources as module
from remask.scheduler.errors import InvalidRequest
from remask.workers.executors.ray_executor import check_version
from remask.workers.executors.ray_resources import WorkerResources, check_num_gpus
from remask.workers.executors.ray_session import RaySession

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    session = RaySession()
    yield session
    session.close()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREE_SECONDS", 0.5)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.1)


@pytest.fixture
def group(session: RaySession) -> Iterator[PlacementGroup]:
    group = ray.util.placement_group([{"CPU": 2}, {"CPU": 1}])
    ray.get(group.ready())
    yield group
    ray.util.remove_placement_group(group)


@ray.remote(num_cpus=1)
class Other:
    def is_there(self) -> bool:
        return True


def occupy(group: PlacementGroup, index: int) -> Any:
    """An actor that is not ours, in a bundle."""
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    other = Other.options(scheduling_strategy=place).remote()
    assert ray.get(other.is_there.remote())
    return other


def refusal(resources: WorkerResources, num_workers: int, session: RaySession, *, num_held: int = 0) -> str:
    with pytest.raises(InvalidRequest) as caught:
        resources.check(num_workers, num_held=num_held, session=session)
    return f"{caught.value.parameter}: {caught.value.problem}"


def test_bundles_that_others_use_are_refused(group: PlacementGroup, session: RaySession) -> None:
    resources = WorkerResources(1, 0, group)
    resources.check(3, num_held=0, session=session)
    others = [occupy(group, 0), occupy(group, 1)]
    problem = refusal(resources, 2, session)
    assert re.match(r"placement_group: 2 workers need a bundle of 1 CPUs and 0 GPUs each; ", problem)
    assert "3 fit, but only 1 beside what uses the bundles now" in problem
    resources.check(1, num_held=0, session=session)
    resources.check(3, num_held=2, session=session)
    for other in others:
        ray.kill(other)


def test_bundles_that_others_have_left_are_waited_for(
    group: PlacementGroup, session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FREE_SECONDS", 20.0)
    ray.kill(occupy(group, 1))
    WorkerResources(1, 0, group).check(3, num_held=0, session=session)


def test_a_free_cpu_of_another_bundle_does_not_make_a_bundle_larger(
    group: PlacementGroup, session: RaySession
) -> None:
    assert "2 workers need a bundle of 2 CPUs and 0 GPUs each; 1 fit" in refusal(
        WorkerResources(2, 0, group), 2, session
    )
    other = occupy(group, 0)
    assert "1 fit, but only 0" in refusal(WorkerResources(2, 0, group), 1, session)
    ray.kill(other)


def test_a_placement_group_that_is_not_ready_is_refused(session: RaySession) -> None:
    pending = ray.util.placement_group([{"CPU": 50}])
    assert refusal(WorkerResources(1, 0, pending), 1, session).startswith(
        "placement_group: is not ready: it is PENDING"
    )
    ray.util.remove_placement_group(pending)
    assert refusal(WorkerResources(1, 0, pending), 1, session) == (
        "placement_group: was removed; make a new one"
    )


def test_a_worker_needs_its_cpus_of_one_node(session: RaySession, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [half, half, {"Alive": False, "Resources": {"CPU": 9.0}}])
    WorkerResources(2, 0, None).check(2, num_held=0, session=session)
    assert "a worker needs 3 CPUs and 0 GPUs of one node; 0 of 1 workers fit" in refusal(
        WorkerResources(3, 0, None), 1, session
    )
    assert WorkerResources(3, 0, None).exceed_cluster()
    assert not WorkerResources(2, 0, None).exceed_cluster()


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "amounts", "count"),
    [
        (1, 0, {"CPU": 3.0}, 3),
        (2, 0, {"CPU": 3.0}, 1),
        (1, 0.1, {"CPU": 16.0, "GPU": 1.0}, 10),  # 1.0 // 0.1 is 9
        (1, 0.6, {"CPU": 16.0, "GPU": 2.0}, 2),  # two do not share a GPU, and none spans two
        (1, 1 / 3, {"CPU": 16.0, "GPU": 2.0}, 6),
        (1, 0.25, {"CPU": 16.0, "GPU": 0.5}, 2),
        (1, 2, {"CPU": 16.0, "GPU": 5.0}, 2),
        (1, 1, {"CPU": 16.0}, 0),
    ],
)
def test_how_many_workers_fit(num_cpus: int, num_gpus: float, amounts: dict[str, float], count: int) -> None:
    assert WorkerResources(num_cpus, num_gpus, None).num_fitting(amounts) == count


@pytest.mark.parametrize("num_gpus", [1.5, 0.00001, float("nan"), float("inf"), -1])
def test_gpus_that_ray_cannot_reserve_are_refused(num_gpus: float) -> None:
    with pytest.raises(InvalidRequest, match="num_gpus_per_worker: must be a whole number, or a share"):
        check_num_gpus(num_gpus)


@pytest.mark.parametrize("num_gpus", [0, 0.0001, 1 / 3, 1, 8.0])
def test_gpus_that_ray_can_reserve_pass(num_gpus: float) -> None:
    check_num_gpus(num_gpus)


def test_an_old_ray_is_refused() -> None:
    check_version("2.52.0")
    with pytest.raises(InvalidRequest, match=r"needs Ray 2\.52 or newer"):
        check_version("2.51.1")
