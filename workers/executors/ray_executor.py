"""The executor that runs bursts on workers of a Ray cluster. Messages are msgspec bytes.

All methods but `scale` and `stage_weights` are called from one thread, the engine's. There is no background
thread: the executor checks and replaces workers while the engine waits for an event.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup

from remask.scheduler.errors import EngineDead, InvalidRequest
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.executors.base import Event, Executor, Finished, Joined
from remask.workers.executors.ray_actor import QUEUE_DEPTH
from remask.workers.executors.ray_pool import Held, WorkerPool, explain, is_ready
from remask.workers.executors.ray_resources import WorkerResources, check_num_gpus, default_gpus
from remask.workers.executors.ray_session import RaySession
from remask.workers.executors.ray_weights import RayWeights
from remask.workers.models.loading import load_checkpoint
from remask.workers.models.shared import share
from remask.workers.models.update import Weights
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import row_budget

OLDEST_RAY = (2, 52)


class _Ready(NamedTuple):
    """An answer that has arrived and has not been read."""

    held: Held
    kind: Literal["burst", "start", "ping"]
    ref: Any


class RayExecutor(Executor):
    """`num_workers` actors. Each has one burst queued beside the one that it runs.

    Args:
        setup: configuration of each worker.
        num_workers: number of workers; `scale` changes it.
        num_cpus: CPUs that Ray reserves for each worker, and its number of threads.
        num_gpus: GPUs that Ray reserves for each worker; None: see `EngineOptions`.
        placement_group: placement group of the workers; None: that of the caller, if it has one.

    Raises:
        InvalidRequest: the cluster has too few resources, the checkpoint is invalid, or Ray is too old.
        Unavailable: Ray cannot be started, or workers die or take too long to start.
    """

    queue_depth = QUEUE_DEPTH

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
        check_num_gpus(num_gpus or 0)
        self._target, self._scaled = num_workers, threading.Event()
        self._ready: deque[_Ready] = deque()
        self._lost: deque[Event] = deque()  # workers that were given up outside of `next_event`
        self._session = RaySession()
        try:
            with self._session.in_use():
                if num_gpus is None:
                    num_gpus = default_gpus(setup.device)
                group = placement_group or get_current_placement_group()
                self._resources = WorkerResources(num_cpus, num_gpus, group)
                self._resources.check(num_workers, num_held=0, session=self._session)
                weights = None
                if setup.load_format == "object_store":
                    weights = ray.put(share(load_checkpoint(Path(setup.model), dtype=setup.dtype)))
                self._pool = WorkerPool(msgspec.msgpack.encode(setup), self._resources, weights)
        except BaseException:
            self._session.close()
            raise
        try:
            with self._session.in_use():
                all_facts = self._pool.start_all(num_workers)
                num_rows = setup.max_num_rows
                if num_rows is None:
                    num_rows = self._pool.measure_knee()
                num_key_rows = min(facts.max_key_rows for facts in all_facts)
                self.facts = msgspec.structs.replace(all_facts[0], max_key_rows=num_key_rows)
                self.max_num_rows = row_budget(num_rows, [facts.row_limit for facts in all_facts])
                self._weights = RayWeights(self._pool, self._session, setup, self.facts)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> list[int]:  # type: ignore[override]
        return self._pool.workers

    def submit(self, batch: StepBatch, worker: int) -> None:
        held, data = self._pool.held[worker], msgspec.msgpack.encode(batch)
        number = held.num_submitted
        held.num_submitted += 1  # first: an actor waits for each number once
        with self._session.in_use():
            try:
                held.bursts.append(held.actor.run.remote(number, data))
            except BaseException as error:
                self._session.check()
                self._lost.append(self._pool.give_up(held, f"no burst could be sent: {explain(error)}"))
                if not isinstance(error, Exception):
                    raise

    def scale(self, num_workers: int) -> None:
        """Changes the number of workers, from any thread and while requests run.

        Raises:
            InvalidRequest: the cluster has too few resources.
            EngineDead: the engine was closed, or Ray was shut down.
        """
        with self._session.in_use():
            if num_workers > self._target:
                num_held = len(self._pool.held)
                self._resources.check(num_workers, num_held=num_held, session=self._session)
        self._target = num_workers
        self._scaled.set()

    def next_event(self, timeout: float | None = None) -> Event | None:
        """Waits for an event. Starts missing workers, stops surplus ones and replaces dead ones meanwhile.

        Args:
            timeout: maximum seconds to wait; None: no limit. 0 does not block and means that the engine is
                idle.

        Returns:
            The event; None if there was none in time.

        Raises:
            Unavailable: no worker is running and none can be started. Not raised if `timeout` is 0.
            EngineDead: the engine was closed, or Ray was shut down.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._session.in_use():
            while True:
                self._session.check()
                if self._scaled.is_set():
                    self._scaled.clear()
                    self._pool.look_soon()
                event = self._read() or self._pool.look(self._target, is_idle=timeout == 0)
                if event is not None:
                    return event
                seconds = self._pool.seconds_to_look()
                if deadline is not None:
                    seconds = min(seconds, max(0.0, deadline - time.monotonic()))
                self._wait(seconds)
                if not self._ready and deadline is not None and time.monotonic() >= deadline:
                    return None

    def stage_weights(self, weights: Weights) -> None:
        with self._session.in_use():
            self._weights.stage(weights)

    def swap_weights(self) -> None:
        with self._session.in_use():
            self._lost.extend(self._weights.swap())

    def close(self) -> None:
        """Kills the workers. In a forked process it does nothing: the workers are the parent's."""
        if self._session.is_foreign:
            return
        try:
            with contextlib.suppress(EngineDead), self._session.in_use():
                self._pool.kill_all()
        finally:
            self._ready.clear()
            self._lost.clear()
            self._pool.clear()
            self._session.close()

    def _wait(self, seconds: float) -> None:
        """Waits for answers and takes all that have arrived, bursts and starts before heartbeats."""
        waited: dict[Any, _Ready] = {}
        for held in self._pool.held.values():
            if held.start is not None:
                waited[held.start] = _Ready(held, "start", held.start)
            elif held.bursts:
                waited[held.bursts[0]] = _Ready(held, "burst", held.bursts[0])
        for held in self._pool.held.values():
            if held.ping is not None:
                waited[held.ping] = _Ready(held, "ping", held.ping)
        if not waited:
            time.sleep(seconds)
            return
        ready, _ = ray.wait(list(waited), num_returns=1, timeout=seconds)
        if ready and len(waited) > 1:  # Ray prefers the first of the list; the others must not starve
            ready, _ = ray.wait(list(waited), num_returns=len(waited), timeout=0)
        self._ready.extend(waited[ref] for ref in ready)

    def _read(self) -> Event | None:
        """The next event among the answers that have arrived."""
        if self._lost:
            return self._lost.popleft()
        while self._ready:
            held, kind, ref = self._ready.popleft()
            if held.number not in self._pool.held:  # removed in the meantime
                continue
            try:
                value: Any = ray.get(ref)
            except RayError as error:
                # A burst that raises is answered as failed; what a worker raises has lost its GPU.
                if kind == "ping" and held.bursts and is_ready(held.bursts[0]):
                    held.ping = None  # the burst has ended before its worker, or will tell of the death
                    continue
                return self._pool.give_up(held, explain(error))
            if kind == "burst":
                held.bursts.popleft()
                return Finished(held.number, msgspec.msgpack.decode(value, type=StepResult))
            if kind == "start":
                self._pool.join(held)
                return Joined(held.number)
            held.ping = None
        return None


def check_version(version: str) -> None:
    """Raises InvalidRequest if Ray is too old."""
    parts = tuple(int(part) for part in version.split(".")[:2])
    if parts < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise InvalidRequest("distributed_executor_backend", f"Ray {version}", f"needs Ray {oldest} or newer")
