"""The endpoints of `remask serve`, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import HTTPException

import remask
from remask.async_llm import AsyncLLM
from remask.openai.bodies import check_model
from remask.openai.responses import error_object
from remask.scheduler.errors import InvalidRequest, RemaskError, shown
from remask.server.answers import (
    INTERNAL_ERROR,
    Answerer,
    EventStream,
    decode,
    failure,
    in_thread_if_large,
)
from remask.server.gate import App, Gate
from remask.server.metrics import Metrics
from remask.server.openapi import description
from remask.server.options import ServerOptions, check_defaults
from remask.server.tokens import detokenize, tokenize
from remask.thread import READY_SECONDS

logger = logging.getLogger(__name__)

DEFAULT_OPTIONS = ServerOptions()
RETRY_SECONDS = 1  # the wait that clients are asked for after 429 and 503
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_CLOSED = 499  # nginx's status of a request whose client has closed the connection

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection."""


class WrongType(InvalidRequest):
    """A body is not JSON by its content type."""

    status = 415


class Served:
    """An engine behind the endpoints of a server, and what they share.

    Args:
        llm: the engine. It is not closed.
        options: of the server. Those of a socket (`host`, `port`, `uds`, `ssl_certfile`, `ssl_keyfile`) and
            `shutdown_timeout` are for who listens.
        defaults: default parameters of requests.

    Attributes:
        options: of the server.
        answerer: admits and answers requests.

    Raises:
        InvalidRequest: an option or a default is invalid.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        options: ServerOptions = DEFAULT_OPTIONS,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        options.check()
        check_defaults(defaults)
        self.engine, self.options = llm.engine, options
        self.names = options.served_model_name or list(self.engine.intake.options.model_names)
        self.metrics = Metrics(self.engine, self.names[0])
        self.answerer = Answerer(self.engine, self.names, dict(defaults), self.metrics)
        self.started = int(time.time())
        self.page, self.page_headers = _page()
        self.description = msgspec.json.encode(description(remask.__version__))


def make_app(served: Served) -> App:
    """The ASGI application: the endpoints, and the gate for keys before them."""
    options, cors = served.options, None
    if options.allowed_origins:
        cors = CORSConfig(
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    endpoints = [
        page, health, ready, version, metrics, openapi, models, model, completions, chat_completions,
        tokenize_prompt, detokenize_ids,
    ]  # fmt: skip
    app = Litestar(
        endpoints,
        state=State({"served": served}),
        openapi_config=None,
        cors_config=cors,
        logging_config=None,
        request_max_body_size=options.max_body_bytes,
        exception_handlers={RemaskError: _refuse, HTTPException: _refuse_http, Exception: _fail},
    )
    return Gate(app, options.api_key, served.metrics.failed)


@get("/", sync_to_thread=False)
def page(state: State) -> Response[bytes]:
    served: Served = state.served
    return Response(served.page, media_type="text/html; charset=utf-8", headers=served.page_headers)


@get("/health", sync_to_thread=False)
def health(state: State) -> Response[dict[str, str]]:
    """Whether the process serves at all: 503 if its engine has ended, so that it should be restarted."""
    state.served.engine.check_alive()
    return Response({"status": "ok"})


@get("/ready", sync_to_thread=False)
def ready(state: State) -> Response[dict[str, str]]:
    """Whether requests should be sent here: 503 while it shuts down or no worker answers."""
    served: Served = state.served
    if served.answerer.is_closing:
        return Response({"status": "shutting down"}, status_code=503)
    if not served.engine.is_ready(READY_SECONDS):
        return Response({"status": "no worker answers"}, status_code=503)
    return Response({"status": "ready"})


@get("/version", sync_to_thread=False)
def version() -> dict[str, str]:
    return {"version": remask.__version__}


@get("/metrics", sync_to_thread=False)
def metrics(state: State) -> Response[bytes]:
    return Response(state.served.metrics.text(), media_type=METRICS_TYPE)


@get("/openapi.json", sync_to_thread=False)
def openapi(state: State) -> Response[bytes]:
    return Response(state.served.description, media_type="application/json")


@get("/v1/models", sync_to_thread=False)
def models(state: State) -> dict[str, Any]:
    return {"object": "list", "data": [_model(state.served, name) for name in state.served.names]}


@get("/v1/models/{name:path}", sync_to_thread=False)
def model(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    name, names = str(request.path_params["name"]), state.served.names
    if name not in names:
        name = name.removeprefix("/")  # which stands in front of every path
    check_model(name, names)
    return _model(state.served, name)


@post("/v1/completions", status_code=200)
async def completions(request: Request[Any, Any, Any], state: State) -> Response[Any]:
    return await _answer("completion", request, state.served)


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: Request[Any, Any, Any], state: State) -> Response[Any]:
    return await _answer("chat", request, state.served)


@post("/tokenize", status_code=200)
async def tokenize_prompt(request: Request[Any, Any, Any], state: State) -> Response[bytes]:
    served: Served = state.served
    body = await _body(request)
    intake, tokenizer = served.engine.intake, served.engine.tokenizer
    found = await in_thread_if_large(body, lambda: tokenize(intake, tokenizer, decode(body), served.names))
    return _json(found)


@post("/detokenize", status_code=200)
async def detokenize_ids(request: Request[Any, Any, Any], state: State) -> Response[bytes]:
    served: Served = state.served
    body = await _body(request)
    intake, tokenizer = served.engine.intake, served.engine.tokenizer
    found = await in_thread_if_large(body, lambda: detokenize(intake, tokenizer, decode(body), served.names))
    return _json(found)


async def _answer(
    kind: Literal["chat", "completion"], request: Request[Any, Any, Any], served: Served
) -> Response[Any]:
    body = await _body(request)
    request_id = request.scope["state"]["request_id"]
    try:
        answer = await _unless_gone(request, served.answerer.answer(kind, body, request_id))
    except ClientGone:
        return Response(b"", status_code=CLIENT_CLOSED)
    return answer if isinstance(answer, EventStream) else _json(answer)


async def _body(request: Request[Any, Any, Any]) -> bytes:
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise WrongType("content-type", kind, "must be application/json")
    return await request.body()


async def _unless_gone(request: Request[Any, Any, Any], work: Awaitable[Result]) -> Result:
    """Waits for some work; cancels it and raises ClientGone if the client closes its connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for own in (task, watch):
            if not own.done():
                own.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await own


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(
        msgspec.json.encode(content), status_code=status, media_type="application/json", headers=headers
    )


def _model(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.started,
        "owned_by": "remask",
        "root": served.names[0],
        "parent": None,
        "max_model_len": served.engine.intake.max_len,
    }


def _refuse(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    assert isinstance(error, RemaskError), "registered for it"
    headers = {"retry-after": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return _json(failure(error), error.status, headers)


def _refuse_http(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The framework's own errors: no such endpoint, another method, a body that is too long."""
    assert isinstance(error, HTTPException), "registered for it"
    status, path, parameter = error.status_code, shown(request.url.path), None
    kind = "invalid_request_error" if status < 500 else "internal_error"
    message = error.detail
    if status == 404:
        message = f"there is no endpoint {path}; GET /openapi.json describes those that there are"
    elif status == 405:
        allowed = sorted(str((error.headers or {}).get("allow", "")).split(", "))
        message = f"{path} does not take {request.method}; use {' or '.join(allowed)}"
    elif status == 413:
        parameter, ceiling = "body", request.app.state.served.options.max_body_bytes
        message = (
            f"body: is longer than the server's max_body_bytes {ceiling}; send fewer or shorter prompts a "
            "request, or start the server with a larger --max-body-bytes"
        )
    return _json(error_object(message, kind, parameter), status, error.headers)


def _fail(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    logger.error("a request has failed", exc_info=error)
    return _json(error_object(INTERNAL_ERROR, "internal_error"), 500)


def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers by which a browser runs its own script and style alone."""
    text = files("remask.server").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
