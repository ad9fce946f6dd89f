"""A server in a thread of the test, and what clients read from it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from remask import AsyncLLM
from remask.server.app import Served
from remask.server.options import ServerOptions
from remask.server.run import Server, bound, make_server

SECONDS = 60.0


class Running:
    """A server that runs, and a client of it.

    Attributes:
        llm: its engine.
        served: what its endpoints share.
        client: asks it; errors of HTTP are responses.
        port: where it listens.
    """

    def __init__(self, llm: AsyncLLM, served: Served, server: Server, port: int) -> None:
        self.llm, self.served, self.server, self.port = llm, served, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def answer(self, **body: Any) -> dict[str, Any]:
        """The response to a text completion that must succeed."""
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The data of a stream's events, which `[DONE]` ends."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            lines = list(response.iter_lines())
        assert response.status_code == 200, lines
        assert response.headers["content-type"].startswith("text/event-stream")
        assert lines[1::2] == [""] * (len(lines) // 2), "an empty line ends an event"
        *data, last = (line.removeprefix("data: ") for line in lines[::2])
        assert last == "[DONE]"
        return [json.loads(own) for own in data]


@contextmanager
def running(
    llm: AsyncLLM, defaults: dict[str, Any] | None = None, *, send_bytes: int | None = None, **options: Any
) -> Iterator[Running]:
    """A server on an engine, which stays open; it ends with the context. `send_bytes` is the size of the
    kernel's buffer of what a client has not taken."""
    own = ServerOptions(port=0, **options)
    served = Served(llm, own, defaults or {})
    is_open = threading.Event()
    server = make_server(served, is_open.set)
    with bound(own) as sock:
        if send_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert is_open.wait(SECONDS)
            found = Running(llm, served, server, sock.getsockname()[1])
            with found.client:
                yield found
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def joined(events: list[dict[str, Any]]) -> dict[int, str]:
    """The texts of a stream's choices."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            new = choice["delta"]["content"] if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + new
    return texts
