"""`AsyncLLM`: coroutines share an engine; what they give up is aborted, and errors reach who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from remask import AsyncLLM, EngineDead, InvalidRequest, RequestOutput, WorkerDied
from remask.workers.executors.base import Left
from remask.workers.executors.in_process import InProcessExecutor

ASK = {"max_tokens": 12, "unmask": "schedule", "temperature": 1.0, "rank": "top"}
PROMPTS = ["123+456=", "111+222=", "999+1="]


def run(test: Callable[[AsyncLLM], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def main() -> Any:
        engine = await AsyncLLM.start("tiny", device="cpu", max_num_rows=512, **options)
        async with engine:
            return await asyncio.wait_for(test(engine), 120)

    return asyncio.run(main())


async def only(
    engine: AsyncLLM, prompt: Any, params: Any = None, request_id: str | None = None
) -> RequestOutput:
    (output,) = [output async for output in engine.generate(prompt, params, request_id)]
    return output


def test_coroutines_share_the_engine_and_get_what_they_asked_for() -> None:
    async def test(engine: AsyncLLM) -> None:
        together = await asyncio.gather(
            *(only(engine, PROMPTS[i % 3], {**ASK, "seed": i}, f"mine {i}") for i in range(12))
        )
        assert [output.request_id for output in together] == [f"mine {i}" for i in range(12)]
        alone = await only(engine, PROMPTS[1], {**ASK, "seed": 7})
        assert together[7].outputs[0].token_ids == alone.outputs[0].token_ids
        assert together[7].prompt == PROMPTS[1]

    run(test, batch_invariant=True)


def test_the_event_loop_goes_on_while_the_engine_works() -> None:
    async def test(engine: AsyncLLM) -> None:
        task = asyncio.create_task(only(engine, PROMPTS[0], {**ASK, "max_tokens": 256, "n": 4}))
        longest, before = 0.0, asyncio.get_running_loop().time()
        while not task.done():
            await asyncio.sleep(0.005)
            now = asyncio.get_running_loop().time()
            longest, before = max(longest, now - before), now
        assert longest < 1.0, "a burst takes longer than a look at the loop may"

    run(test)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_cancelled_coroutine_aborts_its_request(how: str) -> None:
    async def test(engine: AsyncLLM) -> None:
        long = {**ASK, "max_tokens": 256, "n": 64}
        generator = engine.generate(PROMPTS[0], long)
        task = asyncio.ensure_future(anext(generator))
        await asyncio.sleep(0.5)
        assert engine.engine.num_live == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if how == "close":
            await generator.aclose()
        output = await only(engine, PROMPTS[1], ASK)
        assert output.finished
        assert engine.engine.num_live == 0

    run(test, burst=1)


def test_a_bad_request_is_refused_and_harms_no_other() -> None:
    async def test(engine: AsyncLLM) -> None:
        good = asyncio.create_task(only(engine, PROMPTS[0], ASK))
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await only(engine, PROMPTS[1], {"max_tokens": 0})
        assert (await good).finished

    run(test)


def test_a_blamed_request_raises_worker_died_and_a_failed_engine_raises_engine_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(engine: AsyncLLM) -> None:
        executor = engine.engine._engine.executor  # not the class: idle engines of other tests step, too
        assert isinstance(executor, InProcessExecutor)

        def dies(_: float | None) -> Left | None:
            if not executor._queue:
                return None
            executor._queue.clear()
            return Left(0, died=True)

        monkeypatch.setattr(executor, "next_event", dies)
        monkeypatch.setattr("remask.scheduler.blame.MAX_LONE_DEATHS", 1)
        with pytest.raises(WorkerDied, match="1 workers in a row died"):
            await only(engine, PROMPTS[0], ASK)

        def fails(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(executor, "next_event", fails)
        with pytest.raises(EngineDead, match="out of memory"):
            await only(engine, PROMPTS[0], ASK)
        with pytest.raises(EngineDead):
            await only(engine, PROMPTS[0], ASK)

    run(test)


def test_a_closed_engine_raises_for_waiting_and_for_later_requests() -> None:
    async def test(engine: AsyncLLM) -> None:
        waiting = asyncio.create_task(only(engine, PROMPTS[0], {**ASK, "max_tokens": 256, "n": 64}))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead, match="closed"):
            await waiting
        with pytest.raises(EngineDead):
            await only(engine, PROMPTS[0], ASK)

    run(test, burst=1)


def test_engines_stand_side_by_side_in_a_process() -> None:
    async def test(engine: AsyncLLM) -> None:
        async with await AsyncLLM.start("tiny", device="cpu", max_num_rows=512) as other:
            outputs = await asyncio.gather(
                *(only(each, PROMPTS[0], {**ASK, "seed": 3}) for each in (engine, other))
            )
        assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids

    run(test)
