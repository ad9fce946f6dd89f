"""`RemoteEngine` and `Replica` without Serve: replicas that die at any moment change no text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError

from remask import (
    LLM,
    AsyncLLM,
    EngineDead,
    EngineOptions,
    InvalidRequest,
    Overloaded,
    RequestOutput,
    Unavailable,
    WorkerDied,
)
from remask.ray.remote import RemoteEngine
from remask.ray.replica import News, Replica, Work

OPTIONS: dict[str, Any] = {"model": "tiny", "device": "cpu", "max_num_rows": 512, "burst": 2}
HARD = "513264.26..12.1..33...2.1.25......1.="
ASK: dict[str, Any] = {"max_tokens": 36, "block_length": 9, "seed": 5}
POLICIES: list[dict[str, Any]] = [
    {"unmask": "schedule"},
    {"unmask": "capped_threshold:0.4", "remask": "wino:0.95", "temperature": 1.0, "n": 3},
    {"preset": "fast-dllm", "stop": ["34", "21"], "temperature": 1.2, "n": 2},
    {"unmask": "bernoulli", "temperature": 1.0, "logprobs": 1},
    {"unmask": "schedule", "reuse": "both", "refresh": 3},
]


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    own = Replica(OPTIONS)
    yield own
    own._engine.close()


class Mortal:
    """Sends to a replica, which seems to die behind the given numbers of messages, one after another."""

    def __init__(self, replica: Replica, *lives: int) -> None:
        self._replica, self._lives, self.works = replica, list(lives), list[Work]()

    async def __call__(self, work: Work) -> AsyncGenerator[News, None]:
        self.works.append(work)
        life = self._lives.pop(0) if self._lives else None
        heard = 0
        stream = self._replica.run(work)
        try:
            async for news in stream:
                if heard == life:
                    raise RayActorError
                heard += 1
                yield news
        finally:
            await stream.aclose()


def on(send: Callable[[Work], AsyncGenerator[News, None]], **options: Any) -> AsyncLLM:
    return AsyncLLM.on(RemoteEngine(EngineOptions.parse(**OPTIONS, **options), send, lambda: 1))


async def outputs_of(llm: AsyncLLM, params: dict[str, Any], **how: Any) -> list[RequestOutput]:
    return [output async for output in llm.generate(HARD, params, **how)]


def run(work: Callable[[], Coroutine[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("remask.ray.remote.WAIT_SECONDS", 0.01)
    return asyncio.run(work())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.get("unmask") or policy["preset"])
def test_replicas_that_die_change_no_text(
    replica: Replica, tiny_llm: LLM, policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {**ASK, **policy}
    expected = tiny_llm.generate(HARD, params)[0]
    mortals = Mortal(replica, 0, 0), Mortal(replica, 1, 0, 1), Mortal(replica, 2)

    async def all_ways() -> tuple[list[RequestOutput], list[RequestOutput], list[RequestOutput]]:
        first, second, third = map(on, mortals)
        return (
            await outputs_of(first, params),
            await outputs_of(second, params, output_kind="delta", canvas_events=True),
            await outputs_of(third, params, output_kind="cumulative"),
        )

    whole, deltas, cumulative = run(all_ways, monkeypatch)
    assert [len(mortal.works) for mortal in mortals] == [3, 4, 2], "all deaths have happened"
    for own in (whole[-1], cumulative[-1]):
        assert own.finished
        for found, wanted in zip(own.outputs, expected.outputs, strict=True):
            for name in ("text", "token_ids", "finish_reason", "stop_reason", "nfe", "seed", "logprobs"):
                assert getattr(found, name) == getattr(wanted, name), name
    for wanted in expected.outputs:
        parts = [own for output in deltas for own in output.outputs if own.index == wanted.index]
        assert "".join(part.text or "" for part in parts) == wanted.text
        canvas: dict[int, int] = {}
        for event in (event for part in parts for event in part.canvas_events or ()):
            if event.is_commit:
                assert event.position not in canvas
                canvas[event.position] = event.token
            else:
                del canvas[event.position]
        assert [canvas[place] for place in range(len(wanted.token_ids))] == wanted.token_ids


def test_a_stream_goes_on_from_the_block_that_it_had_reached(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(replica, 2)

    async def ask() -> list[RequestOutput]:
        return await outputs_of(on(mortal), {**ASK, "unmask": "schedule"}, output_kind="delta")

    run(ask, monkeypatch)
    first, second = mortal.works
    assert first.canvases[0][1].num_forwards == 0
    assert second.canvases[0][1].block >= 2
    assert second.canvases[0][0].seed == 5


def test_a_trace_has_the_events_of_all_replicas(
    replica: Replica, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {**ASK, "unmask": "capped_threshold:0.4", "remask": "wino:0.95", "trace": True}
    expected = tiny_llm.generate(HARD, params)[0].outputs[0].trace
    mortal = Mortal(replica, 2)

    async def ask() -> list[RequestOutput]:
        return await outputs_of(on(mortal), params)

    (output,) = run(ask, monkeypatch)
    assert len(mortal.works) == 2
    found = output.outputs[0].trace
    assert (found.step, found.position, found.token) == (expected.step, expected.position, expected.token)


def test_a_replica_with_another_model_runs_nothing_and_is_passed_by(
    replica: Replica, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Replica({**OPTIONS, "batch_invariant": True})
    asked: list[Replica] = [other, other, replica]

    async def send(work: Work) -> AsyncGenerator[News, None]:
        async for news in asked.pop(0).run(work):
            yield news

    async def ask() -> list[RequestOutput]:
        return await outputs_of(on(send), ASK)

    (output,) = run(ask, monkeypatch)
    other._engine.close()
    assert asked == []
    assert output.outputs[0].text == tiny_llm.generate(HARD, ASK)[0].outputs[0].text
    monkeypatch.setattr("remask.ray.remote.MAX_OTHERS", 3)
    asked += [other] * 3

    async def fail() -> None:
        with pytest.raises(Unavailable, match="replaced by one with another model"):
            await outputs_of(on(send), ASK)

    run(fail, monkeypatch)


def test_closing_ends_what_waits(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        llm = on(Mortal(replica))
        waiting = asyncio.ensure_future(outputs_of(llm, {**ASK, "unmask": "schedule", "max_tokens": 256}))
        while not replica._engine.num_live:
            await asyncio.sleep(0.01)
        llm.engine.close()
        with pytest.raises(EngineDead):
            await asyncio.wait_for(waiting, 30)

    run(ask, monkeypatch)


def test_a_request_that_replicas_do_not_survive_fails(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(replica, *[0] * 20)

    async def ask() -> None:
        llm = on(mortal)
        with pytest.raises(WorkerDied, match="5 replicas in a row"):
            await outputs_of(llm, ASK)
        await asyncio.sleep(0)
        assert llm.engine.num_live == 0

    run(ask, monkeypatch)
    assert len(mortal.works) == 5


def test_what_cannot_run_is_refused_by_name(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        llm = on(Mortal(replica), max_queued_requests=1)
        with pytest.raises(InvalidRequest, match="unmask"):
            await outputs_of(llm, {"unmask": "thresold"})
        waiting = asyncio.ensure_future(outputs_of(llm, ASK))
        while not llm.engine.num_live:
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="max_queued_requests 1"):
            await outputs_of(llm, ASK)
        assert (await waiting)[-1].finished
        with pytest.raises(InvalidRequest, match="autoscaling_config"):
            llm.scale(2)
        llm.engine.close()
        with pytest.raises(Exception, match="was closed"):
            await outputs_of(llm, ASK)
        assert not llm.engine.is_ready(1.0)

    run(ask, monkeypatch)


def test_a_caller_that_leaves_aborts_its_request_there(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        llm = on(Mortal(replica))
        stream = llm.generate(HARD, {**ASK, "unmask": "schedule", "max_tokens": 256}, output_kind="delta")
        await anext(stream)
        assert replica._engine.num_live == 1
        await stream.aclose()
        for _ in range(500):
            if replica._engine.num_live == llm.engine.num_live == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it runs on")

    run(ask, monkeypatch)


def test_keys_that_do_not_fit_are_not_reused(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Replica({**OPTIONS, "max_key_bytes": 60_000})
    params = {**ASK, "unmask": "schedule", "reuse": "both"}

    async def ask() -> list[RequestOutput]:
        return await outputs_of(on(Mortal(small)), params)

    (output,) = run(ask, monkeypatch)
    small._engine.close()
    exact = tiny_llm.generate(HARD, {**params, "reuse": None})[0]
    assert output.outputs[0].num_query_rows == exact.outputs[0].num_query_rows
