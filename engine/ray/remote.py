"""`RemoteEngine`: the engines of a Ray Serve deployment as one engine.

It makes the requests and their outputs, and keeps the state of every canvas. What a replica held when it died
is sent to another one in the last state that was heard of. A canvas is a function of its state and its seed,
so that its text is the same (to the bit under `batch_invariant`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, TypeAlias

from ray.exceptions import RayError

from remask.checkpoint import intake_of
from remask.engine import Progress
from remask.limits import Admission
from remask.options import EngineOptions
from remask.ray.replica import News, Work, model_of
from remask.scheduler.errors import EngineDead, InvalidRequest, RemaskError, Unavailable, WorkerDied
from remask.scheduler.request import Request
from remask.thread import Listener, Observer

logger = logging.getLogger(__name__)

MAX_DEATHS = 5  # of replicas in a row that had a request, which has not come further meanwhile
MAX_OTHERS = 150  # replicas in a row that have another model
WAIT_SECONDS = 0.2  # before a request is sent to another replica
LOOK_SECONDS = 2.0  # between two looks at the replicas

Send: TypeAlias = Callable[[Work], AsyncGenerator[News, None]]


class RemoteEngine:
    """Sends requests to the replicas of a deployment. All but the constructor belongs to one event loop.

    Args:
        options: of the replicas' engines.
        send: sends a request to a replica, see `Replica.run`.
        num_replicas: the number of replicas that run; called in a thread.

    Attributes:
        intake, tokenizer, observer: as those of `EngineThread`.

    Raises:
        InvalidRequest: an option is invalid.
    """

    def __init__(self, options: EngineOptions, send: Send, num_replicas: Callable[[], int]) -> None:
        self.intake, self._model = intake_of(options), model_of(options)
        self.tokenizer = self.intake.tokenizer
        self.observer: Observer | None = None
        self._send, self._num_replicas, self._admission = send, num_replicas, Admission(options)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_workers, self._look, self._looked = 1, None, time.monotonic()
        self._is_closed = False

    @property
    def num_live(self) -> int:
        return self._admission.num_requests

    @property
    def num_live_tokens(self) -> int:
        return self._admission.num_tokens

    @property
    def num_workers(self) -> int:
        """The number of replicas that ran at the last look; asking for it looks again, in a thread."""
        self._look_again()
        return self._num_workers

    def is_ready(self, seconds: float) -> bool:
        """Whether it was not closed: requests wait for a replica if none runs."""
        return not self._is_closed

    def check_alive(self) -> None:
        """Raises EngineDead after `close`."""
        if self._is_closed:
            raise EngineDead("the engine was closed; make a new one")

    def add(self, requests: Sequence[Request], listener: Listener, *, every_burst: bool = False) -> None:
        """As that of `EngineThread`; the listener hears of finished blocks, and of every burst if events are
        recorded."""
        self.check_alive()
        self._admission.admit(requests)
        for request in requests:
            task = asyncio.ensure_future(self._serve(request, listener, is_watched=every_burst))
            self._tasks[request.request_id] = task
            task.add_done_callback(functools.partial(self._ended, request, listener))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests. Ids that are not live are ignored."""
        for request_id in request_ids:
            if (task := self._tasks.get(request_id)) is not None:
                task.cancel()

    def scale(self, num_workers: int) -> None:
        """Refused: Serve scales the deployment."""
        raise InvalidRequest("num_workers", num_workers, "is Serve's; use num_replicas or autoscaling_config")

    def update_weights(self, weights: Any) -> int:
        """Refused: the weights are those of the deployment."""
        raise InvalidRequest("weights", weights, "are the deployment's; deploy it again with another model")

    def close(self, timeout: float | None = None) -> None:
        """Drops all requests; idempotent. The replicas are Serve's."""
        self._is_closed = True
        self.abort(list(self._tasks))

    async def _serve(self, request: Request, listener: Listener, *, is_watched: bool) -> None:
        """Runs a request to its end on one replica after another, until one lives long enough."""
        num_deaths = num_others = 0
        while True:
            live = [(own.spec, own.state) for own in request.canvases if not own.state.finished]
            if not live:  # the replica died before it could say so
                self._tell(request, News((), True), listener)
                return
            work = Work(live, request.priority, request.stop, is_watched, self._model)
            has_ended = is_other = False
            reason = "its stream broke off"
            try:
                async with contextlib.aclosing(self._send(work)) as stream:
                    async for news in stream:
                        is_other = news.is_other
                        if not is_other:
                            num_deaths = num_others = 0
                            self._tell(request, news, listener)
                            has_ended = news.has_ended
            except (RayError, EngineDead, Unavailable) as error:
                reason = type(error).__name__
            except Exception:
                logger.exception("a request cannot be sent to a replica")
                if not has_ended:
                    self._tell(request, News((), True, Unavailable("no replica takes the request")), listener)
                return
            if has_ended:
                return
            if is_other:
                num_others += 1
            else:
                num_deaths += 1
                logger.warning("a replica has died with request %s: %s", request.request_id, reason)
            failure: RemaskError | None = None
            if num_deaths == MAX_DEATHS:
                failure = WorkerDied(f"{num_deaths} replicas in a row died while they ran the request")
            elif num_others == MAX_OTHERS:
                failure = Unavailable("the application was replaced by one with another model")
            if failure is not None:
                self._tell(request, News((), True, failure), listener)
                return
            await asyncio.sleep(WAIT_SECONDS * max(1, num_deaths))

    def _tell(self, request: Request, news: News, listener: Listener) -> None:
        """Applies what is new to the canvases of a request, and passes it on."""
        by_sample = {own.spec.sample: own for own in request.canvases}
        decode, found = self.intake.decode, list[Progress]()
        if news.has_ended:
            request.failure, request.finish_time = news.failure, time.monotonic()
        for place, moved in enumerate(news.moved, 1):
            canvas = by_sample[moved.sample]
            canvas.state, canvas.text_stop = moved.state, moved.text_stop
            if canvas.spec.trace:
                canvas.events.append(moved.records)
            has_ended = news.has_ended and place == len(news.moved)
            found.append(Progress(canvas, moved.records, request, has_ended, decode))
        if news.has_ended and not news.moved:
            found.append(Progress(request.canvases[0], b"", request, True, decode))
        if self.observer is not None:
            self.observer.heard(found, None)
        for progress in found:
            listener(progress)

    def _ended(self, request: Request, listener: Listener, task: asyncio.Task[None]) -> None:
        del self._tasks[request.request_id]
        self._admission.release(request)
        if self.observer is not None:
            self.observer.dropped([request.request_id])
        if task.cancelled():  # the listener of an aborted request has gone, and is not harmed
            listener(EngineDead("the request was cancelled; make a new one"))
        elif (error := task.exception()) is not None:
            logger.error("a request has been lost", exc_info=error)
            listener(Unavailable("the request was lost; the log has the cause"))

    def _look_again(self) -> None:
        """Looks at the replicas in a thread, unless that was done lately."""
        if time.monotonic() - self._looked > LOOK_SECONDS and (self._look is None or self._look.done()):
            self._looked = time.monotonic()
            self._look = asyncio.ensure_future(self._count())

    async def _count(self) -> None:
        try:
            self._num_workers = await asyncio.to_thread(self._num_replicas)
        except Exception:
            logger.warning("cannot look at the replicas", exc_info=True)
