"""The thread that runs an engine: nothing else touches its core.

Callers in any number of threads and event loops hand over requests, each with a function that is called when
the request has ended. Their requests share every step.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from remask.core import EngineCore
from remask.limits import Limits
from remask.scheduler.errors import EngineDead, RemaskError
from remask.scheduler.request import Request

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between two steps of an idle engine, which look after its workers
CLOSED = "the engine was closed; make a new one"

Listener: TypeAlias = Callable[[Request | RemaskError], None]


class _Live(NamedTuple):
    """A request that has not ended."""

    listener: Listener
    num_tokens: int


class EngineThread:
    """Steps a core until it is closed or fails.

    Args:
        core: whose alone it is from now on.
        limits: ceilings for what may be live.

    Attributes:
        num_live: requests that have been taken and have not ended.
    """

    def __init__(self, core: EngineCore, limits: Limits) -> None:
        self._core, self._limits = core, limits
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}  # the engine thread's own
        self.num_live = self._num_tokens = 0  # under the lock, like the next
        self._dead: RemaskError | None = None
        self._lock = threading.RLock()  # the garbage collector may call `close` wherever it likes
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="remask-engine", daemon=True)
        self._thread.start()

    def check_alive(self) -> None:
        """Raises EngineDead or Unavailable if the engine takes no requests, or not those of this process."""
        if os.getpid() != self._pid:
            problem = f"the engine belongs to process {self._pid}, and this is a fork of it"
            raise EngineDead(f"{problem}; make a new one here, or start processes with the method 'spawn'")
        if self._dead is not None:
            # One of its own for each caller: raising writes the traceback into the exception.
            raise type(self._dead)(*self._dead.args) from self._dead.__cause__

    def add(self, requests: Sequence[Request], listener: Listener) -> None:
        """Takes requests; from any thread.

        Args:
            requests: validated ones.
            listener: called by the engine's thread with each of them when it has ended, or, also more than
                once, with the error that has ended the engine.

        Raises:
            Overloaded: too much is live; none of them was taken.
            EngineDead: the engine was closed or has failed, or belongs to another process.
            Unavailable: it has no workers any more.
        """
        num_tokens = [request.num_canvas_tokens for request in requests]
        self.check_alive()
        with self._lock:
            self.check_alive()
            self._limits.check_live(
                num_requests=self.num_live, num_tokens=self._num_tokens, more=(len(requests), sum(num_tokens))
            )
            self.num_live += len(requests)
            self._num_tokens += sum(num_tokens)
            lives = [_Live(listener, own) for own in num_tokens]
            self._inbox.put(functools.partial(self._add, list(zip(requests, lives, strict=True))))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests that nobody waits for any more; from any thread. Ids that are not live are passed
        over."""
        if os.getpid() == self._pid and self._dead is None:
            self._inbox.put(functools.partial(self._abort, list(request_ids)))

    def close(self) -> None:
        """Ends all requests with EngineDead and frees the workers; idempotent, from any thread. It waits for
        a burst to end."""
        if os.getpid() != self._pid:
            return
        self._inbox.put(self._close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        error: RemaskError = EngineDead(CLOSED)
        try:
            while self._take_messages():
                for request in self._core.step():
                    self._forget(request.request_id, request)
        except RemaskError as failure:
            error = failure
        except BaseException as failure:  # whoever waits must hear of it
            logger.exception("the engine has failed")
            error = EngineDead(f"the engine has failed: {failure!r}; make a new one")
            error.__cause__ = failure
        with self._lock:
            self._dead = error
        try:
            self._core.close()
        finally:
            while not self._inbox.empty():
                self._inbox.get()()
            for request_id in list(self._live):
                self._forget(request_id, error)

    def _take_messages(self) -> bool:
        """Does what callers have asked for; waits for it if there is nothing else to do. False: the engine is
        to close."""
        waits = not self._core.is_busy
        while not self._closing:
            try:
                message = self._inbox.get(timeout=IDLE_SECONDS) if waits else self._inbox.get_nowait()
            except queue.Empty:
                break
            message()
            waits = False
        return not self._closing

    def _add(self, requests: Sequence[tuple[Request, _Live]]) -> None:
        for request, live in requests:
            self._live[request.request_id] = live
            if self._dead is None:
                self._core.add(request)

    def _abort(self, request_ids: Sequence[str]) -> None:
        self._core.abort(request_ids)
        for request_id in request_ids:
            self._forget(request_id)

    def _close(self) -> None:
        self._closing = True

    def _forget(self, request_id: str, result: Request | RemaskError | None = None) -> None:
        """Drops a request that has ended, and tells who listens, unless it was aborted."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        with self._lock:
            self.num_live -= 1
            self._num_tokens -= live.num_tokens
        if result is not None:
            live.listener(result)
