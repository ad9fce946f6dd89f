"""What stands before the endpoints: request ids and keys."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, TypeAlias

import msgspec

from remask.openai.responses import error_object

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]
App: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})  # without a key; they tell nothing of clients
MAX_ID_LEN = 128  # characters of a client's request id
MAX_HEADER_BYTES = 32_768  # of all names and values


class Gate:
    """An ASGI application in front of another one.

    Every response has `X-Request-Id`, the client's if it sent a printable one. With keys, every path but
    `OPEN_PATHS` wants one of them.

    Args:
        app: the application behind it. It finds the request id in the scope's state.
        keys: the keys that are valid; empty: none is asked for.
        on_error: called with the status of each response that is an error.
    """

    def __init__(self, app: App, keys: Collection[str], on_error: Callable[[int], None]) -> None:
        self._app, self._digests = app, [_digest(key.encode()) for key in keys]
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # the first of equal names
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._on_error(message["status"])
                more = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), more]}
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, send_with_id)
        else:
            await _refuse(send_with_id, *refusal)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, dict[str, Any]] | None:
        """Status and body of the response to a request that may not pass; None: it may."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            problem = f"the headers are longer than {MAX_HEADER_BYTES} bytes; send shorter ones"
            return 431, error_object(problem, "invalid_request_error", code="headers_too_large")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if self._digests and path not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = _digest(key.strip())
            known = [hmac.compare_digest(given, own) for own in self._digests]  # all of them, in equal time
            if scheme.lower() != b"bearer" or not any(known):
                problem = "a valid key is needed; send it as `Authorization: Bearer KEY`"
                return 401, error_object(problem, "authentication_error", code="invalid_api_key")
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    if 0 < len(text) <= MAX_ID_LEN and text.isascii() and text.isprintable():
        return text
    return uuid.uuid4().hex


async def _refuse(send: Send, status: int, body: dict[str, Any]) -> None:
    content = msgspec.json.encode(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
