"""The resources of workers, and the check that a Ray cluster or a placement group has them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from remask.scheduler.errors import InvalidRequest
from remask.workers.executors.ray_session import RaySession

FREE_SECONDS = 10.0  # to wait for resources: Ray frees those of an actor some time after its end
POLL_SECONDS = 0.2
UNITS = 10_000  # Ray counts resources in ten-thousandths


class WorkerResources:
    """The resources that Ray reserves for each worker.

    Args:
        num_cpus: CPUs of each worker.
        num_gpus: GPUs of each worker.
        group: placement group of the workers; None: the whole cluster.

    Raises:
        InvalidRequest: Ray cannot reserve `num_gpus`, or `group` is not a placement group.
    """

    def __init__(self, num_cpus: int, num_gpus: float, group: PlacementGroup | None) -> None:
        check_num_gpus(num_gpus)
        if group is not None and (not isinstance(group, PlacementGroup) or group.is_empty):
            raise InvalidRequest("placement_group", group, "give what `ray.util.placement_group` returns")
        self.num_cpus, self.num_gpus, self.group = num_cpus, num_gpus, group

    def actor_options(self) -> dict[str, Any]:
        """Arguments of an actor class's `options`."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group=self.group)
        return options

    def check(self, num_workers: int, *, num_held: int, session: RaySession) -> None:
        """Checks that there are resources for workers. Waits up to FREE_SECONDS for resources in use.

        Args:
            num_workers: wanted number of workers.
            num_held: how many of them already have resources.
            session: session of the engine.

        Raises:
            InvalidRequest: the cluster or the placement group has too few resources.
            EngineDead: Ray was shut down during the wait.
        """
        deadline = time.monotonic() + FREE_SECONDS
        find = self._cluster_problem if self.group is None else self._group_problem
        while True:
            error, may_change = find(num_workers, num_workers - num_held)
            if error is None:
                return
            if not may_change or time.monotonic() > deadline:
                raise error
            time.sleep(POLL_SECONDS)
            session.check()

    def exceed_cluster(self) -> bool:
        """Whether a worker fits no node of the cluster, even if the node is empty."""
        return not any(self.num_fitting(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _cluster_problem(self, num_workers: int, num_new: int) -> tuple[InvalidRequest | None, bool]:
        """An error if the cluster has too few resources, and whether a wait may help."""
        total, free = ray.cluster_resources(), ray.available_resources()
        wanted = {kind: each for kind, each in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if each}
        hopeless, short = (
            [kind for kind, each in wanted.items() if _num_shares(amounts.get(kind, 0), each) < num_new]
            for amounts in (total, free)
        )
        if hopeless or short:
            kind = (hopeless or short)[0]
            problem = (
                f"{num_new} workers need {wanted[kind] * num_new:g} {kind}s; {free.get(kind, 0):g} of the "
                f"cluster's {total.get(kind, 0):g} are free; use fewer workers (data_parallel_size), or a "
                "larger cluster"
            )
            return InvalidRequest(f"num_{kind.lower()}s_per_worker", wanted[kind], problem), not hopeless
        num_fitting = sum(self.num_fitting(node["Resources"]) for node in ray.nodes() if node["Alive"])
        if num_fitting >= num_workers:
            return None, False
        problem = (
            f"a worker needs {self.num_cpus} CPUs and {self.num_gpus:g} GPUs of one node; {num_fitting} of "
            f"{num_workers} workers fit; use fewer workers (data_parallel_size), or larger nodes"
        )
        return InvalidRequest("num_cpus_per_worker", self.num_cpus, problem), False

    def _group_problem(self, num_workers: int, num_new: int) -> tuple[InvalidRequest | None, bool]:
        """An error if the placement group has too few resources, and whether a wait may help."""
        assert self.group is not None, "else it is the cluster's"
        table, free = placement_group_table(self.group), ray.available_resources()
        bundles, state = table.get("bundles", {}), table.get("state", "REMOVED")
        shown = list(bundles.values())
        if state == "REMOVED":
            return InvalidRequest("placement_group", shown, "was removed; make a new one"), False
        num_fitting = sum(map(self.num_fitting, shown))
        need = f"{num_workers} workers need a bundle of {self.num_cpus} CPUs and {self.num_gpus:g} GPUs each"
        if num_fitting < num_workers:
            return InvalidRequest("placement_group", shown, f"{need}; {num_fitting} fit"), False
        # Ray lists each placed bundle as resources of its own names.
        names = {kind: f"{kind}_group_{{}}_{self.group.id.hex()}" for kind in ("CPU", "GPU")}
        num_free = sum(
            self._num_free({kind: free.get(name.format(index), 0) for kind, name in names.items()})
            for index in bundles
        )
        if num_free >= num_new:
            return None, False
        if state != "CREATED":
            problem = (
                f"is not ready: it is {state}, not all of its bundles have nodes; wait for "
                "`ray.get(group.ready())`, or use a larger cluster"
            )
        else:
            problem = f"{need}; {num_fitting} fit, but only {num_free} beside what uses the bundles now"
        return InvalidRequest("placement_group", shown, problem), True

    def num_fitting(self, amounts: Mapping[str, float]) -> int:
        """Number of workers that fit an empty node or bundle."""
        num_gpus = amounts.get("GPU", 0)
        if 0 < self.num_gpus < 1:  # shares of one GPU
            whole, rest = divmod(num_gpus, 1)
            on_gpus = int(whole) * _num_shares(1, self.num_gpus) + _num_shares(rest, self.num_gpus)
        else:
            on_gpus = _num_shares(num_gpus, self.num_gpus)
        return min(_num_shares(amounts.get("CPU", 0), self.num_cpus), on_gpus)

    def _num_free(self, amounts: Mapping[str, float]) -> int:
        """Maximum number of workers that fit free resources. (Ray does not report them for each GPU.)"""
        return min(
            _num_shares(amounts["CPU"], self.num_cpus),
            _num_shares(amounts["GPU"], self.num_gpus),
        )


def default_gpus(device: str) -> float:
    """GPUs of a worker whose number is not given: 1 if the device is "cuda", or if it is "auto" and the
    cluster that this process has joined has GPUs."""
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    return float(device.startswith("cuda") or (device == "auto" and has_gpus))


def check_num_gpus(num_gpus: float) -> None:
    """Raises InvalidRequest if Ray cannot reserve this number of GPUs for an actor."""
    is_whole = 0 <= num_gpus < math.inf and num_gpus == int(num_gpus)
    if not (is_whole or 1 / UNITS <= num_gpus < 1):
        fix = f"must be a whole number, or a share of a GPU below 1 and not below {1 / UNITS}"
        raise InvalidRequest("num_gpus_per_worker", num_gpus, fix)


def _num_shares(amount: float, each: float) -> int:
    """How often `each` fits; a large number if it is 0."""
    return round(amount * UNITS) // round(each * UNITS) if each else 1 << 30
