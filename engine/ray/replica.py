"""`Replica`: an engine as a deployment of Ray Serve, which takes requests in any state.

What it holds may be lost with it at any moment. The caller has the states of all canvases, and sends them to
another replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import msgspec

from remask.engine import Engine, Progress
from remask.intake import Intake
from remask.limits import keeps_keys
from remask.options import EngineOptions
from remask.scheduler.canvas import Canvas, CanvasSpec, CanvasState, TextStop
from remask.scheduler.errors import EngineDead, InvalidRequest, RemaskError, Unavailable
from remask.scheduler.request import Request
from remask.thread import READY_SECONDS, EngineThread

logger = logging.getLogger(__name__)

DECISIVE = ("model", "tokenizer", "dtype", "device", "load_format", "quantization", "batch_invariant")


class Work(NamedTuple):
    """A request as it is sent to a replica: the canvases that have not finished, and how far they have come.

    Attributes:
        canvases: what they are, and their states.
        priority: of the request.
        stop: stop strings.
        is_watched: whether the caller wants states before the end.
        model: what the canvases are of; see `model_of`.
    """

    canvases: Sequence[tuple[CanvasSpec, CanvasState]]
    priority: int
    stop: Sequence[str]
    is_watched: bool
    model: str


class Moved(NamedTuple):
    """A canvas that has come further.

    Attributes:
        sample: number of its sample.
        state: its state.
        records: EVENT records since the last time.
        text_stop: the stop string that has ended it.
    """

    sample: int
    state: CanvasState
    records: bytes
    text_stop: TextStop | None


class News(NamedTuple):
    """What a replica reports about a request.

    Attributes:
        moved: canvases that have come further.
        has_ended: the request has ended.
        failure: the error that ended it.
        is_other: the replica has another model, and has run nothing.
    """

    moved: Sequence[Moved]
    has_ended: bool
    failure: RemaskError | None = None
    is_other: bool = False


class Replica:
    """An engine that runs requests for other processes.

    Args:
        options: fields of `EngineOptions`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        parsed = EngineOptions.parse(**options)
        self._model, self._engine = model_of(parsed), EngineThread(Engine(parsed))

    async def run(self, work: Work) -> AsyncGenerator[News, None]:
        """Runs a request to its end. A caller that closes the generator aborts it.

        If the engine dies the process ends, so that nothing more is sent here.
        """
        if work.model != self._model:  # while the application is replaced by another one
            yield News((), False, is_other=True)
            return
        try:
            async for news in self._run(work):
                yield news
        except InvalidRequest as error:
            yield News((), True, error)
        except (EngineDead, Unavailable):
            logger.exception("the engine has ended; ending its replica")
            logging.shutdown()
            os._exit(1)

    def check_health(self) -> None:
        """Raises an error if the engine has ended or no worker has answered lately; Serve calls it."""
        self._engine.check_alive()
        if not self._engine.is_ready(READY_SECONDS):
            raise Unavailable(f"no worker has answered for {READY_SECONDS:g} seconds")

    async def _run(self, work: Work) -> AsyncGenerator[News, None]:
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Progress | RemaskError]()

        def listen(item: Progress | RemaskError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits
                loop.call_soon_threadsafe(heard.put_nowait, item)

        request = _adopted(self._engine.intake, work)
        blocks = {canvas.spec.sample: canvas.state.block for canvas in request.canvases}
        by_sample = {canvas.spec.sample: canvas for canvas in request.canvases}
        records: dict[int, bytes] = {}
        is_traced = any(spec.trace for spec, _ in work.canvases)  # all bursts have events
        self._engine.add([request], listen, every_burst=work.is_watched or is_traced)
        has_ended = False
        try:
            while not has_ended:
                states: dict[int, CanvasState] = {}
                while not states or not heard.empty():
                    item = await heard.get()
                    if isinstance(item, RemaskError):
                        self._engine.check_alive()
                        raise item
                    has_ended = has_ended or item.has_ended
                    states[item.sample] = item.state
                    records[item.sample] = records.get(item.sample, b"") + item.records
                if has_ended:
                    states = {sample: canvas.state for sample, canvas in by_sample.items()}
                moved = [
                    Moved(sample, state, records.pop(sample, b""), by_sample[sample].text_stop)
                    for sample, state in states.items()
                    if has_ended or state.finished or state.block > blocks[sample] or records.get(sample)
                ]
                blocks |= {own.sample: own.state.block for own in moved}
                if moved:
                    yield News(moved, has_ended, request.failure)
        finally:
            if not has_ended:
                self._engine.abort([request.request_id])


def model_of(options: EngineOptions) -> str:
    """What names a model, and the options by which its texts may differ."""
    return repr([str(getattr(options, name)) for name in DECISIVE])


def _adopted(intake: Intake, work: Work) -> Request:
    """A request that another intake of the same model has made, and whose outputs are made there."""
    ordinal, first = intake.reserve(), intake.reserve_canvases(len(work.canvases))
    canvases: list[Canvas] = []
    for place, (spec, state) in enumerate(work.canvases):
        num_rows = spec.num_key_rows(state.sequence_len)
        if spec.reuse is not None and not keeps_keys(spec.reuse, num_rows, intake.max_key_rows):
            spec = msgspec.structs.replace(spec, reuse=None, refresh=0)
        canvases.append(Canvas(str(ordinal), first + place, spec, state))
    return Request(
        request_id=str(ordinal),
        prompt=None,
        prompt_token_ids=[],
        canvases=canvases,
        priority=work.priority,
        stop_token_ids=(),
        include_stop_in_text=False,
        logprobs=False,
        trace=False,
        stop=work.stop,
        find_stop=intake.search_of(work.stop),
        arrival_time=time.monotonic(),
    )
