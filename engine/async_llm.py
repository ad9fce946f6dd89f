"""`AsyncLLM`: the engine behind an event loop, for servers and asynchronous Ray actors.

A thread of its own runs the engine; the event loop only waits for what it sends. Requests of any number of
coroutines share every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from remask.intake import Prompt
from remask.llm import LLM
from remask.outputs import RequestOutput, request_output
from remask.scheduler.errors import EngineDead, RemaskError
from remask.scheduler.params import SamplingParams
from remask.scheduler.request import Request


@dataclass
class _Stream:
    """Where a request's outputs go: a queue of an event loop."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[RequestOutput | BaseException]

    def send(self, item: RequestOutput | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class AsyncLLM:
    """A model for coroutines.

    The arguments are those of `LLM`, and so are the errors. Making one loads the model and blocks: on an
    event loop use `await AsyncLLM.start(...)`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._inbox: queue.SimpleQueue[tuple[Request, _Stream] | str | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # of live requests; the thread's own
        self._reading = threading.Lock()  # the intake serves one at a time
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="remask-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls, model: str | Path, **options: Any) -> AsyncLLM:
        """Makes one without blocking the event loop."""
        return await asyncio.to_thread(cls, model, **options)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Fills a canvas behind a prompt; yields the output when it has ended.

        Closing the generator, or cancelling who waits for it, aborts the request.

        Args:
            prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: its parameters.
            request_id: what the output calls it; None: a number.

        Raises:
            InvalidRequest: naming the parameter; nothing has run.
            RequestTooLarge: a step of it does not fit into a worker's memory.
            RequestFailed: a step of it raised an error or left numbers that mean nothing.
            WorkerDied: workers died again and again while it ran alone.
            EngineDead, Unavailable: the engine was closed, has failed, or has no workers any more.
        """
        request = await asyncio.to_thread(self._read, prompt, sampling_params)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put((request, stream))
        if self._ended.is_set():  # nobody may be there to answer
            stream.send(EngineDead("the engine was closed; make a new AsyncLLM"))
        try:
            item = await stream.items.get()
            if isinstance(item, BaseException):
                raise item
            yield item if request_id is None else msgspec.structs.replace(item, request_id=request_id)
        finally:
            self._inbox.put(request.request_id)

    def scale(self, num_workers: int) -> None:
        """As `LLM.scale`."""
        self._llm.scale(num_workers)

    def close(self) -> None:
        """Ends all requests and frees the model and the workers; idempotent. It waits for a step to end."""
        self._inbox.put(None)
        self._thread.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _read(self, prompt: Prompt, params: SamplingParams | dict[str, Any] | None) -> Request:
        with self._reading:
            return self._llm._intake.request(self._llm._intake.check(prompt, params))

    def _work(self) -> None:
        """The thread: takes what has come, steps, sends what has ended."""
        error: BaseException = EngineDead("the engine was closed; make a new AsyncLLM")
        try:
            while self._take_messages():
                for request in self._llm._core.step():
                    stream = self._streams.pop(request.request_id, None)
                    if stream is not None and request.failure is not None:
                        stream.send(request.failure)
                    elif stream is not None:
                        stream.send(request_output(request, self._llm._intake.decode))
        except RemaskError as failure:
            error = failure
        except BaseException as failure:  # whoever waits must hear of it
            error = EngineDead(f"the engine has failed: {failure!r}; make a new AsyncLLM")
        finally:
            self._ended.set()
            self._llm.close()
            while not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, tuple):
                    message[1].send(error)
            for stream in self._streams.values():
                stream.send(error)
            self._streams.clear()

    def _take_messages(self) -> bool:
        """Takes new requests and aborts; waits for one where nothing is live. False: the engine is closed."""
        while not self._inbox.empty() or not self._streams:
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, str):
                if self._streams.pop(message, None) is not None:
                    self._llm._core.abort([message])
            else:
                request, stream = message
                self._streams[request.request_id] = stream  # first: it must hear where the engine refuses
                self._llm._core.add(request)
        return True
