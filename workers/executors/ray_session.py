"""Ray as the engines of this process share it.

A process has one connection to Ray, a *session*: from `ray.init` to `ray.shutdown`. The first engine starts
Ray if the process has no session, and the last engine of that session ends it. A session that the host
program started is the host's to end.

The host may end any session at any time. Almost every call into Ray then starts a new Ray instead of failing,
so an engine asks before it calls: the session that it was made in is gone for good.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import ray
from ray.util import client

from remask.scheduler.errors import EngineDead, InvalidRequest, Unavailable

CLOSED = "the engine was closed; make a new LLM"
FOREIGN = "the engine belongs to the process that this one was forked from"
FORKED = "Ray does not survive a fork: this process has its parent's; start processes with the method 'spawn'"
CLIENT = (
    "this process is a Ray Client (ray://), outside of the cluster; run the program in it, such as with "
    "`ray job submit`, or make the engine in an actor"
)
SHUT_DOWN = "Ray was shut down, and the engine's workers with it; make a new LLM"


class _Identity(NamedTuple):
    """A session. No two have the same job on the same node, also if a new cluster has the old address."""

    node_id: str
    job_id: str


_lock = threading.Lock()  # held while Ray starts or ends
_left: deque[_Identity] = deque()  # sessions that an engine has left, one entry for each, not counted yet
_num_engines: Counter[_Identity] = Counter()  # that are open, of each session
_ours: set[_Identity] = set()  # sessions that an engine has started
_known: set[_Identity] = set()  # sessions that engines were made in
_inherited: set[_Identity] = set()  # sessions of the process that this one was forked from


class RaySession:
    """The session of one engine; starts Ray if the process has none.

    Raises:
        InvalidRequest: the process is a Ray Client.
        Unavailable: Ray cannot be started or joined, or the session is one from before a fork.
    """

    def __init__(self) -> None:
        self._pid, self._error, self._is_closed = os.getpid(), "", False
        try:
            with _lock:
                starts = not ray.is_initialized()
                if _is_client():
                    raise InvalidRequest("distributed_executor_backend", "ray", CLIENT)
                if starts:
                    _start_ray()
                identity = _current()
                if identity is None:
                    raise Unavailable(SHUT_DOWN)
                if identity in _inherited:
                    raise Unavailable(FORKED)
                self._identity = identity
                _known.add(identity)
                _num_engines[identity] += 1
                if starts:
                    _ours.add(identity)
        finally:
            _settle()

    def check(self) -> None:
        """Asks whether the engine may call Ray.

        Raises:
            EngineDead: it may not: the engine was closed, Ray was shut down, or this is a forked process.
        """
        if self.is_foreign:
            raise EngineDead(f"{FOREIGN}; make one here, or start processes with the method 'spawn'")
        if not self._error and _current() != self._identity:
            self._error = SHUT_DOWN
        if self._error:
            raise EngineDead(self._error)

    @contextmanager
    def in_use(self) -> Generator[None, None, None]:
        """A block that calls Ray.

        Raises:
            EngineDead: as `check`, before the block, or if the session ends while it runs.
        """
        self.check()
        try:
            yield
        except (Exception, SystemExit):  # `ray.shutdown` raises SystemExit in threads that wait in Ray
            self.check()
            raise

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from that of the engine."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """Ends the engine's use of Ray, and Ray itself if an engine started it and no other uses it;
        idempotent. A forked process ends nothing."""
        if self.is_foreign or self._is_closed:
            return
        self._is_closed, self._error = True, self._error or CLOSED
        _left.append(self._identity)
        _settle()


def _forget_parent() -> None:
    """Runs in a forked process: Ray's connection and its threads are the parent's."""
    global _lock
    _lock = threading.Lock()  # a thread that is not here may hold the old one
    _inherited.update(_known)
    for collection in (_num_engines, _left, _ours, _known):
        collection.clear()


os.register_at_fork(after_in_child=_forget_parent)


def _current() -> _Identity | None:
    """The session of the process; None: it has none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    try:
        return _Identity(context.get_node_id(), context.get_job_id())
    except (AttributeError, RuntimeError, AssertionError):  # it has ended since
        return None


def _is_client() -> bool:
    """Whether the process is a Ray Client, or would be one after `ray.init`. (To connect one of another
    version takes half a minute, and fails without saying why.)"""
    would_be = os.environ.get("RAY_ADDRESS", "").startswith("ray://") and not ray.is_initialized()
    return would_be or client.ray.is_connected()


def _settle() -> None:
    """Counts engines that have left, and ends Ray if the last one has.

    It never waits for the lock: the garbage collector may close an engine while this very thread holds it.
    Whoever holds it settles what has come meanwhile.
    """
    while _left and _lock.acquire(blocking=False):
        try:
            if _left:
                _count_out(_left.popleft())
        finally:
            _lock.release()


def _count_out(identity: _Identity) -> None:
    _num_engines[identity] -= 1
    if _num_engines[identity]:
        return
    del _num_engines[identity]
    if identity in _ours:
        _ours.remove(identity)
        if _current() == identity:
            ray.shutdown()


def _start_ray() -> None:
    try:
        ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
    except BaseException as error:
        # If it says that Ray was initialized already, the host has done so since.
        if not (isinstance(error, RuntimeError) and ray.is_initialized()):
            ray.shutdown()
        if isinstance(error, Exception):
            raise Unavailable(f"Ray cannot be started: {type(error).__name__}: {error}") from error
        raise
