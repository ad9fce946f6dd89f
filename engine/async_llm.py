"""`AsyncLLM`: the engine behind an event loop, for servers and asynchronous Ray actors.

The engine's thread steps, and the event loop waits for its messages. Requests of any number of coroutines
share every step.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

from remask.engine import Engine
from remask.intake import Prompt
from remask.options import EngineOptions, call_signature
from remask.outputs import RequestOutput
from remask.scheduler.params import SamplingParams
from remask.service import EngineService
from remask.streaming import OutputKind, check_kind
from remask.submission import submit
from remask.thread import EngineThread


class AsyncLLM:
    """A masked diffusion language model for coroutines.

    Arguments and errors are those of `LLM`. The constructor loads the model and blocks; on an event loop use
    `await AsyncLLM.start(...)`.

    Attributes:
        engine: The engine that all coroutines share.
    """

    __signature__ = call_signature()

    engine: EngineService

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = engine = EngineThread(Engine(EngineOptions.parse(model=model, **options)))
        weakref.finalize(self, engine.drop)

    @classmethod
    async def start(cls, model: str | Path, **options: Any) -> AsyncLLM:
        """Makes an `AsyncLLM` without blocking the event loop."""
        return await asyncio.to_thread(cls, model, **options)

    @classmethod
    def from_options(cls, options: EngineOptions) -> AsyncLLM:
        """Makes an `AsyncLLM` from its options; it blocks."""
        return cls(**msgspec.structs.asdict(options))

    @classmethod
    def on(cls, engine: EngineService) -> AsyncLLM:
        """An `AsyncLLM` on an engine that exists, which its maker closes."""
        own = cls.__new__(cls)
        own.engine = engine
        return own

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "final_only",
        canvas_events: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Fills a canvas behind a prompt and yields its output.

        A stream yields an output whenever a block of a sample is finished. Its text and tokens can no longer
        change. Characters in which a stop string may begin, and an incomplete character, come later, at the
        latest with the last output of the sample. The texts of "delta" joined are the text of "final_only".

        Closing the generator, or cancelling the task that iterates it, aborts the request.

        Args:
            prompt: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: Parameters of the request.
            request_id: Id of the request in the output. None: a number.
            output_kind: "final_only", "cumulative" (an output has all stable text and tokens of its samples)
                or "delta" (an output has what is new).
            canvas_events: Whether a stream also yields what each burst commits and removes
                (`CompletionOutput.canvas_events`).

        Raises:
            InvalidRequest: A parameter is invalid; the error names it. Nothing has run.
            Overloaded: The engine's queue is full. Nothing has run.
            RequestTooLarge: A step of the request does not fit into a worker's memory.
            RequestFailed: A step of the request raised an error, or its logits are not numbers.
            WorkerDied: Several workers in a row died while the request ran alone.
            EngineDead, Unavailable: The engine was closed, has failed, or has no workers left.
        """
        engine = self.engine
        check_kind(output_kind, canvas_events)
        engine.check_alive()
        # Before anything is awaited, so that seeds follow the order of the calls.
        ordinal = engine.intake.reserve()
        submission = await submit(
            engine,
            lambda: [engine.intake.check(prompt, sampling_params)],
            ordinal=ordinal,
            output_kind=output_kind,
            canvas_events=canvas_events,
        )
        try:
            async for _, output in submission:
                if request_id is not None:
                    output = msgspec.structs.replace(output, request_id=request_id)
                yield output
        finally:
            submission.close()

    async def update_weights(self, weights: Any) -> int:
        """As `LLM.update_weights`."""
        return await asyncio.to_thread(self.engine.update_weights, weights)

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
