"""`AsyncLLM`: the engine behind an event loop, for servers and asynchronous Ray actors.

The engine's thread steps; the event loop only waits for what it sends. Requests of any number of coroutines
share every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

from remask.engine import Engine, Progress
from remask.intake import Prompt
from remask.options import EngineOptions, call_signature
from remask.outputs import RequestOutput
from remask.scheduler.errors import RemaskError
from remask.scheduler.params import SamplingParams
from remask.thread import EngineThread


class AsyncLLM:
    """A model for coroutines.

    The arguments are those of `LLM`, and so are the errors. Making one loads the model and blocks: on an
    event loop use `await AsyncLLM.start(...)`.

    Attributes:
        engine: what all coroutines share.
    """

    __signature__ = call_signature()

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = EngineThread(Engine(EngineOptions.parse(model=model, **options)))
        self._close = weakref.finalize(self, self.engine.close)

    @classmethod
    async def start(cls, model: str | Path, **options: Any) -> AsyncLLM:
        """Makes one without blocking the event loop."""
        return await asyncio.to_thread(cls, model, **options)

    @classmethod
    def from_options(cls, options: EngineOptions) -> AsyncLLM:
        """As `LLM.from_options`; it blocks."""
        return cls(**msgspec.structs.asdict(options))

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
            Overloaded: more is live than the engine's options allow; nothing has run.
            RequestTooLarge: a step of it does not fit into a worker's memory.
            RequestFailed: a step of it raised an error or left numbers that mean nothing.
            WorkerDied: workers died again and again while it ran alone.
            EngineDead, Unavailable: the engine was closed, has failed, or has no workers any more.
        """
        engine, intake = self.engine, self.engine.intake
        engine.check_alive()
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Progress | RemaskError]()

        def send(item: Progress | RemaskError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(items.put_nowait, item)

        ordinal = intake.reserve()  # before anything is awaited, so that seeds follow the order of the calls
        request = await asyncio.to_thread(
            lambda: intake.request(intake.check(prompt, sampling_params), ordinal)
        )
        engine.add([request], send)
        try:
            ended = await items.get()
        finally:
            engine.abort([request.request_id])
        if isinstance(ended, RemaskError):
            engine.check_alive()
            raise ended
        if request.failure is not None:
            raise request.failure
        output = await asyncio.to_thread(lambda: ended.output)
        assert output is not None, "it has ended"
        yield output if request_id is None else msgspec.structs.replace(output, request_id=request_id)

    def scale(self, num_workers: int) -> None:
        """As `LLM.scale`."""
        self.engine.scale(num_workers)

    def close(self) -> None:
        """As `LLM.close`; it waits for a burst to end."""
        self._close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
