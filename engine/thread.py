"""The thread that steps an engine.

Callers in any number of threads and event loops pass requests to it, with a function that is called when a
request has ended. Their requests share every step.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from remask.embedded import model_directory
from remask.engine import Engine, Progress
from remask.outputs import RequestOutput
from remask.scheduler.errors import EngineDead, InvalidRequest, RemaskError
from remask.scheduler.messages import StepResult
from remask.scheduler.plain import plain
from remask.scheduler.request import Request

logger = logging.getLogger(__name__)

READY_SECONDS = 60.0  # within which a worker with work must have answered, for an engine to be ready
IDLE_SECONDS = 1.0  # between two steps of an idle engine, which check its workers
DROP_SECONDS = 10.0  # maximum wait of the garbage collector for an engine to close
CLOSED = "the engine was closed; make a new one"

_engines: weakref.WeakSet[EngineThread] = weakref.WeakSet()

Listener: TypeAlias = Callable[[Progress | RemaskError], None]


class Observer(Protocol):
    """Sees all that an engine does; called by its thread, which waits for it."""

    def heard(self, found: Sequence[Progress], result: StepResult | None) -> None:
        """What a step has brought, and the burst that it applied."""

    def dropped(self, request_ids: Iterable[str]) -> None:
        """Requests that were aborted; some may have ended before."""


class EngineThread:
    """Steps an engine until it is closed or fails.

    Args:
        engine: the engine, which no other thread may step.

    Attributes:
        intake: makes the requests for `add` and `serve`, in any thread.
        tokenizer: the model's tokenizer; None: there is none.
        observer: sees all that the engine does; None: there is none.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.intake, self.tokenizer = engine.intake, engine.tokenizer
        self.observer: Observer | None = None
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}  # the thread's own, as the next line
        self._watched: set[str] = set()  # requests whose listeners hear of every burst
        self._dead: RemaskError | None = None
        self._lock = threading.RLock()  # the garbage collector may call `close` wherever it likes
        self._closing = False
        self._updating = threading.Lock()  # held while weights are replaced
        self._swapped = Future[None]()
        self._swapped.set_result(None)
        _engines.add(self)
        self._thread = threading.Thread(target=self._work, name="remask-engine", daemon=True)
        self._thread.start()

    @property
    def num_live(self) -> int:
        """Number of requests that have not ended."""
        return self._engine.admission.num_requests

    @property
    def num_live_tokens(self) -> int:
        """Tokens of the canvases of these requests."""
        return self._engine.admission.num_tokens

    @property
    def num_workers(self) -> int:
        """Number of the workers that run."""
        return len(self._engine.executor.workers)

    def is_ready(self, seconds: float) -> bool:
        """Whether the engine can serve requests: it has not ended, and a worker has answered in the last
        seconds unless all are idle."""
        return self._dead is None and self._engine.has_answered(seconds)

    def check_alive(self) -> None:
        """Raises EngineDead or Unavailable if the engine has ended, or belongs to another process."""
        if os.getpid() != self._pid:
            problem = f"the engine belongs to process {self._pid}, and this is a fork of it"
            raise EngineDead(f"{problem}; make a new one here, or start processes with the method 'spawn'")
        if self._dead is not None:
            # One of its own for each caller: raising writes the traceback into the exception.
            raise type(self._dead)(*self._dead.args) from self._dead.__cause__

    def add(self, requests: Sequence[Request], listener: Listener, *, every_burst: bool = False) -> None:
        """Adds requests; from any thread.

        Args:
            requests: validated requests.
            listener: called by the engine's thread with the last progress of each request, or with the error
                that has ended the engine, possibly more than once.
            every_burst: whether it is called with all progress of the requests.

        Raises:
            Overloaded: the queue is full; no request was added.
            EngineDead: the engine was closed or has failed, or belongs to another process.
            Unavailable: the engine has no workers left.
        """
        self.check_alive()
        with self._lock:
            self.check_alive()
            self._engine.admission.admit(requests)
            self._inbox.put(functools.partial(self._add, requests, listener, every_burst))

    def serve(
        self,
        requests: Iterable[Request],
        *,
        max_live: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Yields outputs in the order in which requests finish. No request is taken while `max_live` samples
        or more have not ended. `on_progress` is called in the caller's thread with all progress.

        Closing the generator, or an error in it, aborts the requests that have not finished.
        """
        source = iter(requests)
        heard: queue.SimpleQueue[Progress | RemaskError] = queue.SimpleQueue()
        live: dict[str, int] = {}  # samples of each request
        num_live = 0
        try:
            while True:
                more = []
                while max_live is None or num_live < max_live:
                    request = next(source, None)
                    if request is None:
                        break
                    more.append(request)
                    live[request.request_id] = len(request.canvases)
                    num_live += len(request.canvases)
                if not live:
                    return
                if more:
                    self.add(more, heard.put, every_burst=on_progress is not None)
                progress = heard.get()
                if isinstance(progress, RemaskError):
                    self.check_alive()
                    raise progress
                if on_progress is not None:
                    on_progress(progress)
                if not progress.has_ended:
                    continue
                num_live -= live.pop(progress.request_id)
                assert progress.output is not None, "it has ended"
                yield progress.output
        finally:
            self.abort(live)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests; from any thread. Ids that are not live are ignored."""
        if os.getpid() == self._pid and self._dead is None:
            self._inbox.put(functools.partial(self._abort, list(request_ids)))

    def scale(self, num_workers: int) -> None:
        """Changes the number of workers on Ray; from any thread.

        Raises:
            InvalidRequest: the engine is not on Ray, or the cluster has too little.
        """
        num_workers = plain(num_workers)
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            raise InvalidRequest("num_workers", num_workers, "must be a positive integer")
        self._engine.executor.scale(num_workers)

    def update_weights(self, weights: Any) -> int:
        """Replaces the weights while requests run; from any thread, which waits. See `LLM.update_weights`."""
        self.check_alive()
        with ExitStack() as opened:
            opened.enter_context(self._updating)
            if isinstance(weights, str | Path):
                weights = opened.enter_context(model_directory(weights))
            started = time.perf_counter()
            self._engine.executor.stage_weights(weights)
            staged = time.perf_counter()
            swapped = Future[None]()
            with self._lock:
                self.check_alive()
                self._swapped = swapped
                end = functools.partial(swapped.set_result, None)
                self._inbox.put(functools.partial(self._engine.swap_weights, end))
            swapped.result()
            version = self._engine.weights_version
        seconds = staged - started, time.perf_counter() - staged
        logger.info("weights version %d: read in %.2f s, and in use after %.2f s more", version, *seconds)
        return version

    def close(self, timeout: float | None = None) -> None:
        """Ends all requests with EngineDead and frees the workers; idempotent, from any thread. It waits for
        the current burst, at most `timeout` seconds."""
        if os.getpid() != self._pid:
            return
        self._inbox.put(self._close)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def drop(self) -> None:
        """Closes an engine to which no reference is left; waits at most `DROP_SECONDS`. The garbage collector
        may call it in a thread that holds what closing needs, such as a lock of Ray's."""
        self.close(DROP_SECONDS)

    def _work(self) -> None:
        error: RemaskError = EngineDead(CLOSED)
        try:
            while self._take_messages():
                found = self._engine.step()
                if self.observer is not None:
                    self.observer.heard(found, self._engine.result)
                for progress in found:
                    self._tell(progress)
        except RemaskError as failure:
            error = failure
        except BaseException as failure:  # waiting callers must raise it
            logger.exception("the engine has failed")
            error = EngineDead(f"the engine has failed: {failure!r}; make a new one")
            error.__cause__ = failure
        with self._lock:
            self._dead = error
        try:
            self._engine.close()
        finally:
            while not self._inbox.empty():
                self._inbox.get()()
            for listener in self._listeners.values():
                listener(error)
            self._listeners.clear()
            if not self._swapped.done():
                self._swapped.set_exception(error)

    def _tell(self, progress: Progress) -> None:
        request_id = progress.request_id
        if progress.has_ended:
            self._watched.discard(request_id)
            if listener := self._listeners.pop(request_id, None):
                listener(progress)
        elif request_id in self._watched:
            self._listeners[request_id](progress)

    def _take_messages(self) -> bool:
        """Runs the callers' messages; waits for one if no request is live. Returns False if the engine is to
        close."""
        waits = not self._engine.has_unfinished()
        while not self._closing:
            try:
                message = self._inbox.get(timeout=IDLE_SECONDS) if waits else self._inbox.get_nowait()
            except queue.Empty:
                break
            message()
            waits = False
        return not self._closing

    def _add(self, requests: Sequence[Request], listener: Listener, every_burst: bool) -> None:
        for request in requests:
            self._listeners[request.request_id] = listener
            if every_burst:
                self._watched.add(request.request_id)
            with contextlib.suppress(RemaskError):  # the listeners of a dead engine hear of it
                self._engine.add_request(request)

    def _abort(self, request_ids: Sequence[str]) -> None:
        self._engine.abort(request_ids)
        for request_id in request_ids:
            self._listeners.pop(request_id, None)
            self._watched.discard(request_id)
        if self.observer is not None:
            self.observer.dropped(request_ids)

    def _close(self) -> None:
        self._closing = True


@atexit.register
def _close_all() -> None:
    """No engine is left in the middle of a burst when the interpreter ends."""
    for engine in list(_engines):
        engine.close()
