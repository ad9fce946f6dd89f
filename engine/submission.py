"""`Submission`: requests that were added to an engine together, and their outputs for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from remask.engine import Progress
from remask.intake import CheckedPrompt
from remask.outputs import RequestOutput
from remask.scheduler.errors import RemaskError
from remask.scheduler.request import Request
from remask.service import EngineService
from remask.streaming import OutputKind, OutputStream


class PlacedOutput(NamedTuple):
    """An output, and the place of its request among those that were added together."""

    place: int
    output: RequestOutput


class Submission(AsyncIterator[PlacedOutput]):
    """Requests that were added together, all or none. Iterating yields their outputs as they come.

    Outputs that come while the reader is busy are joined: a slow reader costs the engine nothing, and gets
    fewer and longer outputs.

    Args:
        engine: the engine.
        requests: of its intake; nothing of them has run.
        streams: a stream for each request; None: only the last output of each request is wanted.

    Raises:
        Overloaded: the engine's queue is full; no request was added.
        EngineDead, Unavailable: the engine has ended.
    """

    def __init__(
        self, engine: EngineService, requests: Sequence[Request], streams: Sequence[OutputStream] | None
    ) -> None:
        self._engine, self._streams = engine, streams
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        self._live = {request.request_id: request for request in requests}
        self._heard: asyncio.Queue[Progress | RemaskError] = asyncio.Queue()
        self._ready: deque[PlacedOutput] = deque()
        loop = asyncio.get_running_loop()

        def send(item: Progress | RemaskError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits
                loop.call_soon_threadsafe(self._heard.put_nowait, item)

        engine.add(requests, send, every_burst=streams is not None)

    async def __anext__(self) -> PlacedOutput:
        """The next output.

        Raises:
            RequestTooLarge, RequestFailed, WorkerDied: one of the requests has failed.
            EngineDead, Unavailable: the engine has ended.
        """
        while not self._ready:
            if not self._live and self._heard.empty():
                raise StopAsyncIteration
            by_place: dict[int, list[Progress]] = {}
            while not (by_place and self._heard.empty()):
                item = await self._heard.get()
                if isinstance(item, RemaskError):
                    self._engine.check_alive()
                    raise item
                by_place.setdefault(self._places[item.request_id], []).append(item)
                if item.has_ended:
                    request = self._live.pop(item.request_id, None)  # None: it was aborted meanwhile
                    if request is not None and request.failure is not None:
                        raise request.failure
            self._ready += await asyncio.to_thread(self._outputs, by_place)
        return self._ready.popleft()

    def fail(self, error: RemaskError) -> None:
        """Ends the requests with an error, which the reader gets; on the event loop."""
        self._heard.put_nowait(error)
        self.close()

    def close(self) -> None:
        """Aborts the requests that have not ended; idempotent."""
        if self._live:
            self._engine.abort(list(self._live))
            self._live.clear()

    def _outputs(self, by_place: dict[int, list[Progress]]) -> list[PlacedOutput]:
        found = []
        for place, heard in by_place.items():
            output = heard[-1].output if self._streams is None else self._streams[place].update(heard)
            if output is not None:
                found.append(PlacedOutput(place, output))
        return found


async def submit(
    engine: EngineService,
    check: Callable[[], Sequence[CheckedPrompt]],
    *,
    ordinal: int | None = None,
    output_kind: OutputKind = "final_only",
    canvas_events: bool = False,
) -> Submission:
    """Makes requests in a thread and adds them.

    Args:
        engine: the engine.
        check: the checked prompts; called in a thread.
        ordinal: number of the first request, which the intake has reserved; None: the next.
        output_kind, canvas_events: see `AsyncLLM.generate`.

    Raises:
        InvalidRequest: what `check` raises.
        Overloaded, EngineDead, Unavailable: see `Submission`.
    """

    def prepare() -> tuple[list[Request], list[OutputStream] | None]:
        checked = check()
        first = engine.intake.reserve(len(checked)) if ordinal is None else ordinal
        requests = [engine.intake.request(entry, first + place) for place, entry in enumerate(checked)]
        if output_kind == "final_only":
            return requests, None
        streams = [
            OutputStream(
                request, output_kind, entry.params.stop, engine.tokenizer, canvas_events=canvas_events
            )
            for request, entry in zip(requests, checked, strict=True)
        ]
        return requests, streams

    return Submission(engine, *await asyncio.to_thread(prepare))
