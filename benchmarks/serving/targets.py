"""Targets of a load: the engine, and the base classes of all other targets.

Many coroutines call a target at once. Each target decides how it batches their requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from remask import AsyncLLM, Unavailable
from remask.benchmarks.workloads import Job

MAX_CONCURRENCY = 1024  # requests under way


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        num_tokens: visible ones.
        nfe: model forwards that the request took part in; None: not known.
        first_token_seconds: after the request; None: everything came at once.
    """

    text: str | None
    num_tokens: int
    nfe: int | None = None
    first_token_seconds: float | None = None


class Target(AbstractAsyncContextManager["Target", None]):
    """Answers requests. Leaving its context frees its resources."""

    name: str

    @abstractmethod
    async def answer(self, job: Job) -> Answer:
        """Answers a request. Any exception makes it a failed one."""


class EngineTarget(Target):
    """remask, in this process or with workers on Ray.

    Args:
        engine: closed with the target.
    """

    name = "remask"

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    async def answer(self, job: Job) -> Answer:
        async for output in self._engine.generate({"prompt_token_ids": job.prompt}, job.params):
            sample = output.outputs[0]
            return Answer(sample.text, sample.num_visible_tokens, sample.nfe)
        raise Unavailable("the engine has ended")

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._engine.close)


class ThreadedTarget(Target):
    """A target whose thread takes jobs from a queue. None in the queue ends the thread."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Job, asyncio.Future[Answer]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @abstractmethod
    def _work(self) -> None:
        """Serves the queue until it is ended, in the thread."""

    async def answer(self, job: Job) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put((job, future))
        return await future

    async def __aexit__(self, *_: object) -> None:
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)


class BatchingTarget(ThreadedTarget):
    """Serves waiting requests in batches. A batch runs to its end before the next one starts.

    Attributes:
        max_batch: most requests of a batch.
    """

    max_batch: int

    @abstractmethod
    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers of one batch."""

    def _work(self) -> None:
        ends = False
        while not ends and (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.max_batch and not self._waiting.empty() and not ends:
                more = self._waiting.get()
                if more is None:
                    ends = True
                else:
                    batch.append(more)
            try:
                outcomes: Sequence[Answer | Exception] = self.generate([job for job, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                settle(future, outcome)


def settle(future: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    """Gives a future its outcome, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits
        future.get_loop().call_soon_threadsafe(_settle, future, outcome)


def _settle(future: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Answer):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
