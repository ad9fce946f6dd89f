"""Workers on a Ray cluster: interchangeable actors that may die at any moment.

An actor owns weights and nothing that cannot be lost. What goes over the wire are msgspec bytes. A worker
that dies or stalls is replaced by a new one, with a new number, that joins when it has loaded the model; its
bursts are the engine's to give to others. Ray is started only where it is not, and shut down only then.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from remask.scheduler.errors import InvalidRequest, Unavailable
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.executor import Event, Executor, Finished, Joined, Left
from remask.workers.models.loading import load_checkpoint
from remask.workers.models.shared import SharedWeights, share
from remask.workers.start import WorkerFacts, WorkerSetup, start_worker
from remask.workers.worker import Worker

logger = logging.getLogger(__name__)

OLDEST_RAY = (2, 52)
LOOK_SECONDS = 1.0  # between two looks at what does not report by itself
PING_SECONDS = 5.0  # between two heartbeats
STALL_SECONDS = 60.0  # a worker that answers no heartbeat for so long is taken for dead
FREE_SECONDS = 10.0  # how long resources are waited for that somebody gives back
STARVED_SECONDS = 30.0  # how long a cluster without workers may be too small for one
START_SECONDS = 600.0  # a worker that is not ready by then is not coming
MAX_FAILED_STARTS = 3  # in a row


class RemaskWorker:
    """The actor: a worker behind bytes."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._worker: Worker | None = None
        self._decoder = msgspec.msgpack.Decoder(StepBatch)  # here: msgspec crashes where two threads make it
        self._launching, self._num_launched = threading.Condition(), 0

    def start(self, setup: bytes, weights: SharedWeights | None) -> bytes:
        """Loads the model; returns what the engine must know of it. (Errors of a constructor lose their
        type on the way.)"""
        torch.set_num_threads(self._num_threads)  # a setting of the thread, and Ray chooses that
        self._worker, facts = start_worker(msgspec.msgpack.decode(setup, type=WorkerSetup), weights)
        return msgspec.msgpack.encode(facts)

    @ray.method(concurrency_group="bursts")
    def run(self, number: int, batch: bytes) -> bytes:
        """A burst and its result. Bursts are launched in the order of their numbers (0, 1, ...); the next one
        runs on a GPU while this one's result is read and goes back."""
        assert self._worker is not None, "it has not started"
        torch.set_num_threads(self._num_threads)
        with self._launching:
            self._launching.wait_for(lambda: self._num_launched == number)
            try:
                launched = self._worker.launch(self._decoder.decode(batch))
            finally:
                self._num_launched += 1
                self._launching.notify_all()
        return msgspec.msgpack.encode(self._worker.collect(launched))

    @ray.method(concurrency_group="health")
    def ping(self) -> None:
        """Answers while a burst runs."""


@dataclass
class _Held:
    """A worker as the executor holds it."""

    actor: Any
    start: Any  # ref; None when it has joined
    since: float  # monotonic seconds of its start
    bursts: list[Any] = field(default_factory=list)  # refs, in order
    num_submitted: int = 0
    ping: Any = None  # ref of the heartbeat that is under way
    pinged: float = 0.0
    leaving: bool = False


class RayExecutor(Executor):
    """`num_workers` actors, fed each with one burst more than it runs.

    Args:
        setup: how each of them starts.
        num_workers: how many there shall be; `scale` changes it.
        num_cpus: what Ray reserves for each, and its threads.
        num_gpus: likewise; None: see `LLM`.
        placement_group: where they go; None: that of the caller, if it has one.

    Raises:
        InvalidRequest: the cluster has too little, the checkpoint is at fault, or Ray is too old.
        Unavailable: workers die while they start.
    """

    queue_depth = 2

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        num_workers: int,
        num_cpus: int,
        num_gpus: float | None,
        placement_group: PlacementGroup | None,
    ) -> None:
        check_version(ray.__version__)
        self._setup = msgspec.msgpack.encode(setup)
        self._target, self._numbers = num_workers, itertools.count()
        self._held: dict[int, _Held] = {}
        self._failed_starts, self._reason = 0, "none was asked for"
        self._closed, self._weights = False, None
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
        try:
            if num_gpus is None:
                has_gpus = ray.cluster_resources().get("GPU", 0) > 0
                num_gpus = float(setup.device.startswith("cuda") or (setup.device == "auto" and has_gpus))
            self._resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
            self._placement_group = placement_group or get_current_placement_group()
            self._check_resources(num_workers)
            if setup.load_format == "object_store":
                model = load_checkpoint(Path(setup.model), dtype=setup.dtype)
                self._weights = ray.put(share(model))
            self._reconcile()
            self.facts = self._await_all()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> list[int]:  # type: ignore[override]
        """Those that take bursts."""
        return [n for n, held in self._held.items() if held.start is None and not held.leaving]

    def submit(self, batch: StepBatch, worker: int) -> None:
        held = self._held[worker]
        held.bursts.append(held.actor.run.remote(held.num_submitted, msgspec.msgpack.encode(batch)))
        held.num_submitted += 1

    def scale(self, num_workers: int) -> None:
        """Wants another number of workers; may be called from any thread, while requests run.

        Raises:
            InvalidRequest: the cluster has too little for them.
        """
        if num_workers > self._target:
            self._check_resources(num_workers)
        self._target, self._failed_starts = num_workers, 0

    def next_event(self, timeout: float | None = None) -> Event | None:
        while True:
            self._reconcile()
            event = self._stalled()
            if event is not None:
                return event
            refs = self._refs()
            if not refs:
                raise Unavailable(f"no worker is left, and none is coming: {self._reason}")
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=LOOK_SECONDS)
            for ref in ready:
                event = self._take(ref, *refs[ref])
                if event is not None:
                    return event

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._target = 0
        if ray.is_initialized():
            goodbyes = [held.actor.ping.remote() for held in self._held.values()]
            for held in self._held.values():
                ray.kill(held.actor)
            if goodbyes:  # they fail when the actors are gone
                ray.wait(goodbyes, num_returns=len(goodbyes), timeout=10)
            if self._owns_ray:
                ray.shutdown()
        self._held.clear()
        self._weights = None

    def _refs(self) -> dict[Any, tuple[int, str]]:
        """What to wait for: each worker's first burst, its heartbeat, or its start."""
        now, refs = time.monotonic(), {}
        for number, held in self._held.items():
            if held.start is not None:
                refs[held.start] = (number, "start")
                continue
            if held.bursts:
                refs[held.bursts[0]] = (number, "burst")
            if held.ping is None and now - held.pinged > PING_SECONDS:
                held.ping, held.pinged = held.actor.ping.remote(), now
            if held.ping is not None:
                refs[held.ping] = (number, "ping")
        if not refs and self._held:  # everybody is idle, and nobody's heartbeat is due
            number, held = next(iter(self._held.items()))
            held.ping, held.pinged = held.actor.ping.remote(), now
            refs[held.ping] = (number, "ping")
        return refs

    def _take(self, ref: Any, number: int, kind: str) -> Event | None:
        held = self._held[number]
        try:
            value: Any = ray.get(ref)
        except RayError as error:
            if kind == "start":
                self._failed_starts += 1
            # A burst that raises has failed and is answered. What a worker raises itself has lost its GPU.
            return self._gone(number, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        if kind == "ping":
            held.ping = None
        elif kind == "start":
            held.start, held.pinged = None, time.monotonic()
            self._failed_starts = 0
            return Joined(number)
        else:
            held.bursts.pop(0)
            return Finished(number, msgspec.msgpack.decode(value, type=StepResult))
        return None

    def _stalled(self) -> Event | None:
        for number, held in list(self._held.items()):
            if _is_late(held.start, held.since, START_SECONDS):
                self._failed_starts = MAX_FAILED_STARTS
                return self._gone(number, f"a worker was not ready within {START_SECONDS:.0f} s")
            if _is_late(held.start, held.since, STARVED_SECONDS) and self._is_starved():
                self._failed_starts = MAX_FAILED_STARTS
                return self._gone(number, "the cluster has become too small for a worker")
            if _is_late(held.ping, held.pinged, STALL_SECONDS):
                return self._gone(number, f"a worker answered nothing for {STALL_SECONDS:.0f} s")
            if held.leaving and not held.bursts:
                self._drop(number)
                return Left(number, died=False)
        return None

    def _is_starved(self) -> bool:
        """Whether nobody works and the cluster, all of it, could not hold a worker."""
        if self.workers:
            return False
        total = ray.cluster_resources()
        wanted = {"CPU": self._resources["num_cpus"], "GPU": self._resources["num_gpus"]}
        return any(count > total.get(kind, 0) for kind, count in wanted.items())

    def _gone(self, number: int, reason: str) -> Event:
        logger.warning("worker %d is gone: %s", number, reason)
        self._reason = reason
        self._drop(number)
        return Left(number, died=True)

    def _drop(self, number: int) -> None:
        ray.kill(self._held.pop(number).actor)

    def _reconcile(self) -> None:
        """Starts what is missing and lets go what is too many."""
        staying = [number for number, held in self._held.items() if not held.leaving]
        for number in staying[self._target :]:
            self._held[number].leaving = True
        if self._failed_starts >= MAX_FAILED_STARTS:
            return
        for _ in range(self._target - len(staying)):
            self._start()

    def _start(self) -> None:
        options: dict[str, Any] = {"name": f"RemaskWorker-{uuid.uuid4()}"}
        if self._placement_group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._placement_group
            )
        as_actor = ray.remote(concurrency_groups={"health": 1, "bursts": self.queue_depth})  # type: ignore[call-overload]
        actor_class = as_actor(RemaskWorker)
        actor = actor_class.options(**options, **self._resources).remote(
            max(1, int(self._resources["num_cpus"]))
        )
        self._held[next(self._numbers)] = _Held(
            actor, actor.start.remote(self._setup, self._weights), time.monotonic()
        )

    def _await_all(self) -> WorkerFacts:
        """Waits until all workers have started: what is wrong on one node shows before any work does."""
        facts = None
        for number, held in self._held.items():
            try:
                told: Any = ray.get(held.start, timeout=START_SECONDS)
            except RayTaskError as error:
                cause = _cause(error)
                raise cause.at(f"worker {number}") if isinstance(cause, InvalidRequest) else cause from None
            except RayError as error:
                raise Unavailable(f"worker {number} died while it started: {error}") from None
            facts = facts or msgspec.msgpack.decode(told, type=WorkerFacts)
        assert facts is not None, "there is a worker"
        return facts

    def _check_resources(self, num_workers: int) -> None:
        """Raises InvalidRequest where the cluster cannot hold so many workers, with those that are there."""
        cpus, gpus = self._resources["num_cpus"], self._resources["num_gpus"]
        if self._placement_group is not None:
            bundles = self._placement_group.bundle_specs
            fitting = sum(
                min(int(bundle.get(kind, 0) // each) for kind, each in (("CPU", cpus), ("GPU", gpus)) if each)
                for bundle in bundles
            )
            if fitting < num_workers:
                problem = (
                    f"{num_workers} workers need a bundle of {cpus} CPUs and {gpus} GPUs each; {fitting} fit"
                )
                raise InvalidRequest("placement_group", bundles, problem)
            return
        num_workers -= len(self._held)
        wanted = {"CPU": cpus * num_workers, "GPU": gpus * num_workers}
        total, deadline = ray.cluster_resources(), time.monotonic() + FREE_SECONDS
        while True:
            free = ray.available_resources()
            short = [kind for kind, count in wanted.items() if count > free.get(kind, 0)]
            if not short:
                return
            # What ended a moment ago is not yet counted as free.
            if any(wanted[kind] > total.get(kind, 0) for kind in short) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        kind = short[0]
        name, each = ("num_cpus_per_worker", cpus) if kind == "CPU" else ("num_gpus_per_worker", gpus)
        problem = (
            f"{num_workers} workers need {wanted[kind]:g} {kind}s; {free.get(kind, 0):g} of the cluster's "
            f"{total.get(kind, 0):g} are free; use fewer workers (data_parallel_size), or a larger cluster"
        )
        raise InvalidRequest(name, each, problem)


def _is_late(ref: Any, since: float, seconds: float) -> bool:
    """Whether an answer that was asked for so long ago is not there; it may be, and nobody has looked."""
    return ref is not None and time.monotonic() - since > seconds and not ray.wait([ref], timeout=0)[0]


def _cause(error: RayTaskError) -> Exception:
    """What was raised in the worker."""
    return error.cause if isinstance(error.cause, Exception) else error


def check_version(version: str) -> None:
    """Raises InvalidRequest where Ray is too old."""
    parts = tuple(int(part) for part in version.split(".")[:2])
    if parts < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise InvalidRequest("distributed_executor_backend", f"Ray {version}", f"needs Ray {oldest} or newer")
