"""The Ray actors of one engine: start, heartbeats and replacement.

A worker that dies or stalls is replaced by a new one, with a new number. The executor calls `look` while the
engine waits for an event. There is no background thread.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import uuid
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError

from remask.scheduler.errors import InvalidRequest, Unavailable
from remask.workers.executors.base import Left
from remask.workers.executors.ray_actor import QUEUE_DEPTH, RemaskWorker
from remask.workers.executors.ray_resources import WorkerResources
from remask.workers.startup.start import WorkerFacts

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # between two checks of starts and heartbeats
PING_SECONDS = 5.0  # between two heartbeats of a worker
STALL_SECONDS = 60.0  # without an answer to a heartbeat, after which a worker counts as dead
START_SECONDS = 600.0  # for a worker to get its resources and load the model
STARVED_SECONDS = 30.0  # that a cluster too small for a worker is tolerated while no worker runs
STARTS_PER_LOOK = 8
MAX_FAILED_STARTS = 3  # in a row; the next start waits, and only while a worker runs or the engine is idle
RETRY_SECONDS = 60.0  # between failed starts and the next
CLOSE_SECONDS = 10.0  # for actors to end

_foreign: list[object] = []  # handles of the process that this one was forked from


@dataclass(eq=False)
class Held:
    """A worker as the engine holds it."""

    number: int
    actor: Any
    start: Any  # ref; None: it has joined
    since: float  # monotonic seconds of its start
    bursts: deque[Any] = field(default_factory=deque)  # refs, in order
    num_submitted: int = 0
    ping: Any = None  # ref of the heartbeat in flight
    pinged: float = 0.0  # monotonic seconds of the last heartbeat
    leaving: bool = False  # gets no more bursts, and leaves when it has none


class WorkerPool:
    """The workers of one engine.

    Args:
        setup: encoded `WorkerSetup`.
        resources: resources of each worker.
        weights: ref of the weights; None: workers read files.

    Attributes:
        held: all workers by number, in the order of their starts.
        workers: numbers of the workers that take bursts.
        reason: why the last worker was given up or did not start.
    """

    def __init__(self, setup: bytes, resources: WorkerResources, weights: Any) -> None:
        self.held: dict[int, Held] = {}
        self.workers: list[int] = []
        self.reason = "none was asked for"
        self._setup, self._resources, self._weights = setup, resources, [weights]
        self._numbers = itertools.count()
        self._failed_starts, self._failed_at = 0, 0.0
        self._look_at = 0.0  # monotonic seconds of the next look
        self._finalizer = weakref.finalize(self, _keep_foreign, os.getpid(), self.held, self._weights)
        self._finalizer.atexit = False

    def start(self) -> None:
        """Starts a worker; it joins later."""
        groups = {"health": 1, "bursts": QUEUE_DEPTH, "weights": 1}
        actor_class = ray.remote(concurrency_groups=groups)(RemaskWorker)  # type: ignore[call-overload]
        options = {"name": f"RemaskWorker-{uuid.uuid4()}", **self._resources.actor_options()}
        actor = actor_class.options(**options).remote(max(1, self._resources.num_cpus))
        number, start = next(self._numbers), actor.start.remote(self._setup, *self._weights)
        self.held[number] = Held(number, actor, start, time.monotonic())

    def start_all(self, num_workers: int) -> list[WorkerFacts]:
        """Starts the first workers and waits until all have joined, with one deadline. A node that cannot run
        a worker is found before any request runs.

        Raises:
            InvalidRequest: the checkpoint or the device is invalid on a worker.
            Unavailable: a worker died, or was not ready within START_SECONDS.
        """
        deadline = time.monotonic() + START_SECONDS
        for _ in range(num_workers):
            self.start()
        waited = {held.start: held for held in self.held.values()}
        facts: dict[int, Any] = {}
        while waited:
            ready, _ = ray.wait(list(waited), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(held.number) for held in waited.values())
                raise Unavailable(
                    f"timeout: of {len(self.held)} workers these were not ready within {START_SECONDS:g} s: "
                    f"{late}; their resources are not free, or they take longer to load the model"
                )
            held = waited.pop(ready[0])
            try:
                facts[held.number] = ray.get(ready[0])
            except RayTaskError as error:
                cause = _cause(error)
                if isinstance(cause, InvalidRequest):
                    raise cause.at(f"worker {held.number}") from None
                raise cause from None
            except RayError as error:
                raise Unavailable(f"worker {held.number} died while it started: {explain(error)}") from None
            self.join(held)
        return [msgspec.msgpack.decode(facts[number], type=WorkerFacts) for number in sorted(facts)]

    def measure_knee(self) -> int:
        """The knee, measured by the first worker. All workers have joined and are idle.

        Raises:
            Unavailable: the worker died, or took longer than START_SECONDS.
        """
        held = next(iter(self.held.values()))
        try:
            return ray.get(held.actor.knee.remote(), timeout=START_SECONDS)
        except RayError as error:
            problem = f"worker {held.number} could not measure the knee: {explain(error)}"
            raise Unavailable(f"{problem}; give max_num_rows, and it is not measured") from None

    def join(self, held: Held) -> None:
        """Marks a worker as started."""
        held.start, held.pinged = None, time.monotonic()
        self._failed_starts = 0
        self._list_workers()

    def look(self, target: int, *, is_idle: bool) -> Left | None:
        """Every LOOK_SECONDS, removes a worker that is late or surplus, or starts missing workers and sends
        heartbeats. The caller has read all answers that have arrived.

        Args:
            target: wanted number of workers.
            is_idle: whether the engine has nothing to run.

        Returns:
            The worker that was removed; None: no worker was.

        Raises:
            Unavailable: no worker is running, none can be started, and the engine is not idle.
        """
        if time.monotonic() < self._look_at:
            return None
        for place, held in enumerate(self.held.values()):
            held.leaving = place >= target
        self._list_workers()
        for held in list(self.held.values()):
            if held.leaving and not held.bursts:
                self.drop(held)
                return Left(held.number, died=False)
            reason = self._lateness(held)
            if reason is not None:
                return self.give_up(held, reason, num_failures=MAX_FAILED_STARTS)
        self._start_missing(target, may_retry=is_idle or bool(self.workers))
        if not (self.held or is_idle):
            raise Unavailable(f"no worker is left, and none is coming: {self.reason}")
        now = time.monotonic()
        for held in self.held.values():
            if held.start is None and held.ping is None and now - held.pinged > PING_SECONDS:
                held.ping, held.pinged = held.actor.ping.remote(), now
        self._look_at = now + LOOK_SECONDS
        return None

    def seconds_to_look(self) -> float:
        """Seconds until the next check is due."""
        return max(0.0, self._look_at - time.monotonic())

    def look_soon(self) -> None:
        """Makes the next check due, and resets the count of failed starts."""
        self._look_at, self._failed_starts = 0.0, 0

    def give_up(self, held: Held, reason: str, *, num_failures: int = 1) -> Left:
        """Removes a worker that has died, or counts as dead.

        Args:
            held: the worker.
            reason: why.
            num_failures: number of failed starts it counts as, if it has not joined.
        """
        logger.warning("worker %d is gone: %s", held.number, reason)
        if held.start is not None:
            self._note_failed_start(reason, num_failures)
        elif not self._failed_starts:  # else that says why none is coming
            self.reason = reason
        self.drop(held)
        return Left(held.number, died=True)

    def drop(self, held: Held) -> None:
        """Ends a worker, dead or not; the next look starts another if it is missing."""
        del self.held[held.number]
        self._list_workers()
        self._look_at = 0.0  # the next check may start another
        ray.kill(held.actor)

    def renew(self, setup: bytes, weights: Any) -> None:
        """What workers start with from now on; see the constructor."""
        self._setup, self._weights[:] = setup, [weights]

    def kill_all(self) -> None:
        """Kills all actors and waits up to CLOSE_SECONDS for their end."""
        goodbyes = [held.actor.ping.remote() for held in self.held.values()]
        for held in self.held.values():
            ray.kill(held.actor)
        if goodbyes:  # the calls fail at the actors' end
            ray.wait(goodbyes, num_returns=len(goodbyes), timeout=CLOSE_SECONDS)

    def clear(self) -> None:
        """Drops all handles."""
        self.held.clear()
        self.workers = []
        self._weights.clear()
        self._finalizer.detach()

    def _lateness(self, held: Held) -> str | None:
        """Why a worker counts as dead or stuck; None if it does not."""
        if _is_late(held.start, held.since, START_SECONDS):
            return f"timeout: it was not ready within {START_SECONDS:g} s"
        if _is_late(held.start, held.since, STARVED_SECONDS) and self._is_starved():
            return "the cluster has become too small for a worker"
        if _is_late(held.ping, held.pinged, STALL_SECONDS):
            return f"timeout: it answered no heartbeat within {STALL_SECONDS:g} s"
        return None

    def _is_starved(self) -> bool:
        """Whether no worker takes bursts and the cluster is too small for one."""
        return not self.workers and self._resources.exceed_cluster()

    def _list_workers(self) -> None:
        self.workers = [n for n, held in self.held.items() if held.start is None and not held.leaving]

    def _note_failed_start(self, reason: str, count: int = 1) -> None:
        self.reason = reason
        self._failed_starts += count
        self._failed_at = time.monotonic()

    def _start_missing(self, target: int, *, may_retry: bool) -> None:
        pauses = not may_retry or time.monotonic() - self._failed_at < RETRY_SECONDS
        if self._failed_starts >= MAX_FAILED_STARTS and pauses:
            return
        for _ in range(min(target - len(self.held), STARTS_PER_LOOK)):
            try:
                self.start()
            except Exception as error:  # whatever Ray raises; its session is checked by the executor
                self._note_failed_start(f"no actor could be made: {explain(error)}")
                logger.warning("a worker was not started: %s", self.reason)
                return


def _keep_foreign(pid: int, *handles: object) -> None:
    """Keeps the handles of a dropped pool alive in a forked process: Ray would kill the parent's actors with
    the last handle."""
    if pid != os.getpid():
        _foreign.append(handles)


def is_ready(ref: Any) -> bool:
    """Whether an answer has arrived; it may be unread."""
    return bool(ray.wait([ref], timeout=0)[0])


def _is_late(ref: Any, since: float, seconds: float) -> bool:
    """True if `ref` is older than `seconds` and not ready. Polls, because a ready answer may be unread."""
    return ref is not None and time.monotonic() - since > seconds and not is_ready(ref)


def _cause(error: BaseException) -> BaseException:
    """The exception that the worker raised."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return error


def explain(error: BaseException) -> str:
    """Class and first line of an error."""
    cause = _cause(error)
    return ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])
