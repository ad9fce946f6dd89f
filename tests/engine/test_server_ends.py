"""Overload and ends of `remask serve`: full queues, clients that leave or read slowly, and shutting down."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Running, running

from remask import AsyncLLM, EngineDead
from remask.engine import Engine
from remask.workers.executors.in_process import InProcessExecutor

# Some hundred forwards, one after another.
LONG: dict[str, Any] = {
    "prompt": "1+2=",
    "max_tokens": 400,
    "block_length": 8,
    "unmask": "schedule",
    "ignore_eos": True,
}
MEDIUM = {**LONG, "max_tokens": 120}
SHORT: dict[str, Any] = {"prompt": "12..34..2.4.43.1=", "max_tokens": 16, "block_length": 16}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    own = AsyncLLM("tiny", device="cpu", max_num_rows=512, max_queued_requests=6)
    yield own
    own.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.01)


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw_request(server: Running, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing is read; `receive_bytes` is its buffer's size."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(head.encode() + content)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(llm: AsyncLLM, stream: bool) -> None:
    with running(llm) as server:
        sock = raw_request(server, {**LONG, "stream": stream})
        wait_for(lambda: llm.engine.num_live == 1)
        time.sleep(0.2)  # it runs
        sock.close()
        started = time.monotonic()
        wait_for(lambda: llm.engine.num_live == 0)
        assert time.monotonic() - started < 2, "it was aborted and did not run to its end"
        assert server.answer(**SHORT)["choices"][0]["text"] == "1234341221434321"
        assert not server.served.answerer.live


def test_a_full_queue_answers_429_and_takes_more_when_there_is_room(llm: AsyncLLM) -> None:
    with running(llm) as server:
        held = [raw_request(server, {**LONG, "stream": True}) for _ in range(6)]
        wait_for(lambda: llm.engine.num_live == 6)
        response = server.post("/v1/completions", **SHORT)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "Overloaded"
        assert server.client.get("/ready").status_code == 200
        for sock in held:
            sock.close()
        wait_for(lambda: llm.engine.num_live == 0)
        assert server.post("/v1/completions", **SHORT).status_code == 200
        # All prompts of a body are admitted, or none is; to send a body again helps only if it can fit.
        response = server.post("/v1/completions", **{**SHORT, "prompt": ["1+2="] * 7})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        assert "max_queued_requests; a call may have at most 6" in response.json()["error"]["message"]
        held = [raw_request(server, {**LONG, "stream": True}) for _ in range(4)]
        wait_for(lambda: llm.engine.num_live == 4)
        assert server.post("/v1/completions", **{**SHORT, "prompt": ["1+2="] * 3}).status_code == 429
        assert llm.engine.num_live == 4
        for sock in held:
            sock.close()
        wait_for(lambda: llm.engine.num_live == 0)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_many_requests_at_once_are_answered_or_refused(llm: AsyncLLM, count: int) -> None:
    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.post("/v1/completions", json=SHORT)).status_code

    async def ask_all(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(ask(client) for _ in range(count)))

    with running(llm) as server:
        asyncio.run(ask_all(server.url))  # what the process allocates once
        before = resident_bytes()
        statuses = asyncio.run(ask_all(server.url))
        assert set(statuses) == {200, 429}
        assert llm.engine.num_live == 0
        assert not server.served.answerer.live
        assert resident_bytes() - before < 32e6


def test_a_slow_reader_delays_no_other_request(llm: AsyncLLM) -> None:
    body = {**MEDIUM, "n": 8, "temperature": 1.0, "stream": True, "stream_options": {"canvas": True}}
    with running(llm, send_bytes=4096) as server:
        slow = raw_request(server, body, receive_bytes=4096)
        wait_for(lambda: llm.engine.num_live == 1)
        for _ in range(3):
            assert server.post("/v1/completions", **SHORT).status_code == 200
        wait_for(lambda: llm.engine.num_live == 0, 60)  # it has run to its end
        time.sleep(0.3)
        assert len(server.served.answerer.live) == 1, "the stream waits for its reader"
        text = b""
        while b"[DONE]" not in text:
            part = slow.recv(1 << 16)
            assert part, "the stream ends with [DONE]"
            text += part
        slow.close()
        wait_for(lambda: not server.served.answerer.live)


def test_a_server_whose_worker_does_not_answer_is_not_ready(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, next_event = threading.Event(), InProcessExecutor.next_event

    def hanging(self: InProcessExecutor, timeout: float | None = None) -> Any:
        goes_on.wait()
        return next_event(self, timeout)

    monkeypatch.setattr("remask.server.app.READY_SECONDS", 0.2)
    with running(llm) as server, ThreadPoolExecutor() as pool:
        assert server.client.get("/ready").status_code == 200
        monkeypatch.setattr(InProcessExecutor, "next_event", hanging)
        answer = pool.submit(server.answer, **SHORT)
        try:
            wait_for(lambda: server.client.get("/ready").status_code == 503, 10)
            assert server.client.get("/ready").json() == {"status": "no worker answers"}
            assert server.client.get("/health").status_code == 200
        finally:
            goes_on.set()
        assert answer.result()["choices"][0]["text"] == "1234341221434321"
        assert server.client.get("/ready").status_code == 200
        monkeypatch.setattr(llm.engine._engine.executor, "workers", ())
        assert server.client.get("/ready").status_code == 503


def test_a_response_is_not_held_back(llm: AsyncLLM) -> None:
    """Nagle's algorithm would add 40 ms to every response."""
    with running(llm) as server:
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            assert server.client.get("/health").status_code == 200
            seconds.append(time.perf_counter() - started)
    assert min(seconds[1:]) < 0.03


def begin_end(server: Running) -> None:
    server.server.handle_exit(15, None)


def test_a_signal_lets_what_runs_end_and_admits_nothing(llm: AsyncLLM) -> None:
    with running(llm) as server, ThreadPoolExecutor() as pool:
        running_on = pool.submit(server.events, **MEDIUM)
        wait_for(lambda: llm.engine.num_live == 1)
        begin_end(server)
        assert server.client.get("/ready").status_code == 503
        response = server.post("/v1/completions", **SHORT)
        assert response.status_code == 503
        assert "shutting down" in response.json()["error"]["message"]
        assert running_on.result()[-1]["choices"][0]["finish_reason"] == "length"
        wait_for(lambda: server.server.should_exit)


def test_what_has_not_ended_in_time_gets_an_error(llm: AsyncLLM) -> None:
    with running(llm, shutdown_timeout=0.3) as server, ThreadPoolExecutor() as pool:
        stream = pool.submit(server.events, **LONG)
        whole = pool.submit(server.post, "/v1/completions", **LONG)
        wait_for(lambda: llm.engine.num_live == 2)
        begin_end(server)
        assert "shutting down" in stream.result()[-1]["error"]["message"]
        assert whole.result().status_code == 503
    wait_for(lambda: llm.engine.num_live == 0)


def test_an_engine_that_fails_is_told_by_all_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    fails = threading.Event()
    step = Engine.step

    def failing(self: Engine) -> Any:
        if fails.is_set() and self.intake is llm.engine.intake:
            raise EngineDead("the engine has failed: OSError('/a/secret/path')")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    with running(llm) as server, ThreadPoolExecutor() as pool:
        stream = pool.submit(server.events, **LONG)
        wait_for(lambda: llm.engine.num_live == 1)
        fails.set()
        error = stream.result()[-1]["error"]
        assert error["type"] == "EngineDead"
        assert error["message"] == "The engine was closed or has failed; make a new one."
        for path in ("/health", "/ready"):
            assert server.client.get(path).status_code == 503
        assert server.post("/v1/completions", **SHORT).status_code == 503
    llm.close()
