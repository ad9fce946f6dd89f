"""Answers: bodies to requests of the engine, and their outputs to responses and streams."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import msgspec
from litestar.response import Stream

from remask.intake import CheckedPrompt
from remask.openai.bodies import Asked, read_body
from remask.openai.chunks import Chunk, ChunkWriter
from remask.openai.responses import ID_PREFIXES, Completion, completion, error_body, error_object
from remask.outputs import RequestOutput
from remask.scheduler.errors import MAX_SHOWN, InvalidRequest, RemaskError, Unavailable
from remask.server.metrics import Metrics
from remask.service import EngineService
from remask.submission import Submission, submit

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "the server has failed; its log has the cause"
DONE = b"data: [DONE]\n\n"
SMALL_BYTES = 65_536  # bodies that are parsed on the event loop


class ShuttingDown(Unavailable):
    """The server is shutting down; send the request to another one, or again later."""

    def __init__(self) -> None:
        super().__init__("a request came, or has not ended, while the server shuts down")


class Answerer:
    """Answers the bodies of completions for one engine.

    Args:
        engine: the engine.
        names: names of the model; responses have the first.
        defaults: default parameters of requests.
        metrics: counts the answers.

    Attributes:
        is_closing: nothing new is admitted.
        live: submissions that have not been answered.
    """

    def __init__(
        self, engine: EngineService, names: Sequence[str], defaults: dict[str, Any], metrics: Metrics
    ) -> None:
        self._engine, self._names, self._defaults, self._metrics = engine, names, defaults, metrics
        self.is_closing = False
        self.live: weakref.WeakSet[Submission] = weakref.WeakSet()

    async def answer(
        self, kind: Literal["chat", "completion"], body: bytes, request_id: str
    ) -> Completion[Any] | EventStream:
        """The response to a body. Cancelling the call aborts the requests.

        Raises:
            InvalidRequest: the body is invalid.
            Overloaded: the engine's queue is full.
            ShuttingDown: nothing new is admitted.
            RemaskError: a request has failed.
        """
        if self.is_closing:
            raise ShuttingDown
        asked = await in_thread_if_large(body, self._read, kind, body)
        checked: list[CheckedPrompt] = []

        def check() -> list[CheckedPrompt]:
            checked.extend(asked.check(self._engine.intake))
            return checked

        stream = asked.stream
        try:
            submission = await submit(
                self._engine,
                check,
                output_kind="final_only" if stream is None else "delta",
                canvas_events=stream is not None and stream.canvas,
            )
        except InvalidRequest as error:
            raise error.renamed(asked.names) from None
        self.live.add(submission)
        about = {
            "id": f"{ID_PREFIXES[kind]}-{request_id}",
            "created": int(time.time()),
            "model": self._names[0],
        }
        if stream is not None:
            params = checked[0].params
            writer = ChunkWriter(
                kind,
                self._engine.tokenizer,
                n=params.n,
                canvas=(params.max_tokens, params.block_length),
                echo=asked.echo,
                options=stream,
                about=about,
            )
            events = self._events(submission, writer, checked)
            return EventStream(events, lambda: self._end(submission))
        try:
            outputs: dict[int, RequestOutput] = {}
            async for place, output in submission:
                outputs[place] = output
                self._count_request(output, checked)
        finally:
            self._end(submission)
        ordered = [outputs[place] for place in range(len(checked))]
        response = completion(kind, ordered, self._engine.tokenizer, echo=asked.echo, **about)
        self._count_ended(response)
        return response

    def fail_live(self) -> None:
        """Ends all that is not answered with an error."""
        for submission in list(self.live):
            submission.fail(ShuttingDown())

    def _read(self, kind: Literal["chat", "completion"], body: bytes) -> Asked:
        fields = decode(body)
        return read_body(kind, fields, model_names=self._names, defaults=self._defaults, is_served=True)

    def _end(self, submission: Submission) -> None:
        submission.close()
        self.live.discard(submission)

    async def _events(
        self, submission: Submission, writer: ChunkWriter, checked: Sequence[CheckedPrompt]
    ) -> AsyncIterator[bytes]:
        """The server-sent events of a stream."""
        try:
            async for place, output in submission:
                for chunk in writer.chunks(place, output):
                    self._count_ended(chunk)
                    yield event(chunk)
                if output.finished:
                    self._count_request(output, checked)
            for chunk in writer.last():
                yield event(chunk)
        except RemaskError as error:
            self._metrics.failed(error.status)
            yield event(failure(error))
        except Exception:
            logger.exception("a stream has failed")
            self._metrics.failed(500)
            yield event(error_object(INTERNAL_ERROR, "internal_error"))
        yield DONE

    def _count_ended(self, answer: Completion[Any] | Chunk[Any]) -> None:
        for choice in answer.choices:
            if choice.finish_reason is not None:
                self._metrics.sample_ended(
                    choice.completion_tokens, choice.tokens_per_forward, choice.finish_reason
                )

    def _count_request(self, output: RequestOutput, checked: Sequence[CheckedPrompt]) -> None:
        params = checked[0].params
        self._metrics.request_ended(output, n=params.n, max_tokens=params.max_tokens)


class EventStream(Stream):
    """A response of server-sent events. Its end, or a client that leaves at any moment, calls `close`."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx passes the events on
        super().__init__(events, media_type="text/event-stream", headers=headers, status_code=200)
        self._close = close

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().to_asgi_response(*args, **kwargs)

        async def closing(scope: Any, receive: Any, send: Any) -> None:
            try:
                await response(scope, receive, send)
            finally:
                self._close()

        return closing


def decode(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        InvalidRequest: it is not JSON.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"is not JSON: {error}"
    raise InvalidRequest("body", body[: 4 * MAX_SHOWN].decode(errors="replace"), problem)


def failure(error: RemaskError) -> dict[str, Any]:
    """The error object that a client gets.

    If the server is to blame, the object names the class of the error alone: messages may hold what is not a
    client's to know. The log has them.
    """
    if error.status < 500:
        return error_body(error)
    logger.error("%s: %s", type(error).__name__, error)
    return error_object((type(error).__doc__ or "").partition("\n")[0], type(error).__name__)


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def in_thread_if_large(body: bytes, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that works on a body; for a large one in a thread."""
    if len(body) <= SMALL_BYTES:
        return function(*args)
    return await asyncio.to_thread(function, *args)
