"""Runs the server: binds the port, loads the model, serves, and ends without losing what runs.

The address is bound before the model is loaded, so that a port in use is reported at once, and the port opens
when the model is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from remask.async_llm import AsyncLLM
from remask.options import EngineOptions
from remask.scheduler.errors import InvalidRequest
from remask.server.answers import Answerer
from remask.server.app import Served, make_app
from remask.server.gate import MAX_HEADER_BYTES
from remask.server.options import ServerOptions, check_defaults

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that they do not meet a closed one
LAST_SECONDS = 5  # for the last responses to be written


def serve(
    engine: EngineOptions,
    options: ServerOptions,
    defaults: dict[str, Any],
    on_start: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        engine: validated options of the engine.
        options: options of the server.
        defaults: default parameters of requests.
        on_start: called with the server's address when the port is open.

    Raises:
        InvalidRequest: an option is invalid, the address cannot be bound, or the model cannot be loaded. The
            port was not open.
    """
    options.check()
    check_defaults(defaults)
    with bound(options) as sock:
        llm = AsyncLLM.from_options(engine)
        try:
            address = _address(options, sock)
            served = Served(llm, options, defaults)
            try:
                sock.listen(BACKLOG)
            except OSError as error:  # two servers may bind one port before either listens
                problem = f"was taken while the model was loaded: {error.strerror or error}; use another one"
                raise InvalidRequest("port", options.port, problem) from None
            make_server(served, lambda: on_start(address)).run(sockets=[sock])
        finally:
            llm.close()


def make_server(served: Served, on_start: Callable[[], None]) -> Server:
    """The server of an application; `on_start` is called when the port is open."""
    options = served.options
    config = uvicorn.Config(
        make_app(served),
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        root_path=options.root_path,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        ws="none",
    )
    return Server(config, served.answerer, options.shutdown_timeout, on_start)


class Server(uvicorn.Server):
    """A uvicorn server that serves what runs to its end before it shuts down.

    Args:
        config: of uvicorn.
        answerer: admits and answers requests.
        shutdown_timeout: seconds that running requests have after a signal.
        on_start: called when the port is open.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        answerer: Answerer,
        shutdown_timeout: float,
        on_start: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._answerer, self._timeout, self._on_start = answerer, shutdown_timeout, on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; reports that the port is open."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains the server, a second one ends the process at once."""
        if self._answerer.is_closing or self._loop is None:
            os._exit(128 + sig)
        self._answerer.is_closing = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        logger.warning(
            "shutting down: nothing more is admitted, and what runs (%d requests) has %g seconds to end",
            len(self._answerer.live),
            self._timeout,
        )
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Waits for what runs, at most the timeout, and fails the rest."""
        ends = time.monotonic() + self._timeout
        while self._answerer.live and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        if self._answerer.live:
            logger.warning("%d requests have not ended in time", len(self._answerer.live))
            self._answerer.fail_live()
        self.should_exit = True


@contextmanager
def bound(options: ServerOptions) -> Iterator[socket.socket]:
    """A socket that is bound to the server's address and does not listen yet."""
    if options.uds is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(options.uds)
            sock.bind(options.uds)
        except OSError as error:
            sock.close()
            raise InvalidRequest("uds", options.uds, f"cannot be bound: {error.strerror or error}") from None
    else:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        # Without the protocol asyncio does not switch Nagle's algorithm off, which holds back for 40 ms what
        # follows the head of a response.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((options.host, options.port))
        except OSError as error:
            sock.close()
            name = "host" if isinstance(error, socket.gaierror) else "port"
            problem = f"cannot be bound: {error.strerror or error}; use another one"
            raise InvalidRequest(name, getattr(options, name), problem) from None
    try:
        yield sock
    finally:
        sock.close()
        if options.uds is not None:
            with suppress(OSError):
                Path(options.uds).unlink()


def _remove_stale(path: str) -> None:
    """Removes the socket file of a process that has ended."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # binding fails, and the file stays
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _address(options: ServerOptions, sock: socket.socket) -> str:
    if options.uds is not None:
        return f"unix:{options.uds}"
    scheme = "http" if options.ssl_certfile is None else "https"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
