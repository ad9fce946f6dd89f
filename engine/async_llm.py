"""`AsyncLLM`: the engine behind an event loop, for servers and asynchronous Ray actors.

The engine's thread steps, and the event loop waits for its messages. Requests of any number of coroutines
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
    """A masked diffusion language model for coroutines.

    Arguments and errors are those of `LLM`. The constructor loads the model and blocks; on an event loop use
    `await AsyncLLM.start(...)`.

    Attributes:
        engine: The engine that all coroutines share.
    """

    __signature__ = call_signature()

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = EngineThread(Engine(EngineOptions.parse(model=model, **options)))
        weakref.finalize(self, self.engine.drop)

    @classmethod
    async def start(cls, model: str | Path, **options: Any) -> AsyncLLM:
        """Makes an `AsyncLLM` without blocking the event loop."""
        return await asyncio.to_thread(cls, model, **options)

    @classmethod
    def from_options(cls, options: EngineOptions) -> AsyncLLM:
        """Makes an `AsyncLLM` from its options; it blocks."""
        return cls(**msgspec.structs.asdict(options))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Fills a canvas behind a prompt and yields the output.

        Closing the generator, or cancelling the task that iterates it, aborts the request.

        Args:
            prompt: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: Parameters of the request.
            request_id: Id of the request in the output. None: a number.

        Raises:
            InvalidRequest: A parameter is invalid; the error names it. Nothing has run.
            Overloaded: The engine's queue is full. Nothing has run.
            RequestTooLarge: A step of the request does not fit into a worker's memory.
            RequestFailed: A step of the request raised an error, or its logits are not numbers.
            WorkerDied: Several workers in a row died while the request ran alone.
            EngineDead, Unavailable: The engine was closed, has failed, or has no workers left.
        """
        engine, intake = self.engine, self.engine.intake
        engine.check_alive()
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Progress | RemaskError]()

        def send(item: Progress | RemaskError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits
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
        self.engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
