"""Options of the server beside those of the engine."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.params import resolve

KEY_VARIABLE = "REMASK_API_KEY"
# Ceilings of the engine that a server sets by default.
ENGINE_DEFAULTS: dict[str, int] = {
    "max_prompts_per_call": 256,
    "max_tokens_per_call": 262_144,
    "max_n": 128,
    "max_queued_requests": 4096,
    "max_queued_tokens": 4_194_304,
}


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `remask serve`. The constructor stores them unchecked; `check` validates them.

    Attributes:
        host: Address to listen on. The default is reached from this machine alone.
        port: Port to listen on. 0: a free one.
        uds: Path of a Unix domain socket to listen on, in place of host and port.
        api_key: Key that clients must send as `Authorization: Bearer KEY`. May be repeated; any of them is
            valid. The variable REMASK_API_KEY holds one, too.
        served_model_name: Name of the model in requests and responses. May be repeated; responses have the
            first. Empty: the model as given.
        ssl_certfile: Certificate chain in PEM format; the server then speaks HTTPS.
        ssl_keyfile: Private key of the certificate. Empty: it is in the same file.
        root_path: Path under which a reverse proxy shows the server.
        allowed_origins: Origins whose pages may read responses (CORS). May be repeated. Empty: none.
        max_body_bytes: Maximum bytes of a request's body.
        shutdown_timeout: Seconds that running requests have to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: list[str] = []
    served_model_name: list[str] = []
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    root_path: str = ""
    allowed_origins: list[str] = []
    max_body_bytes: int = 4_194_304
    shutdown_timeout: float = 30.0

    def check(self) -> None:
        """Raises InvalidRequest if an option is invalid."""
        if not 0 <= self.port <= 65535:
            raise InvalidRequest("port", self.port, "must be from 0 to 65535")
        if self.max_body_bytes < 1:
            raise InvalidRequest("max_body_bytes", self.max_body_bytes, "must be at least 1")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise InvalidRequest("shutdown_timeout", self.shutdown_timeout, "must be seconds, 0 or more")
        for name in ("host", "uds"):
            if getattr(self, name) == "":
                raise InvalidRequest(name, "", "is empty; leave it out, or give a value")
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                problem = "is empty or has characters that no header can carry; give printable ASCII text"
                raise InvalidRequest("api_key", "*" * len(key), problem)  # a key is not shown
        if not all(self.served_model_name):
            raise InvalidRequest("served_model_name", "", "is empty; leave it out, or give a name")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest("root_path", self.root_path, "must begin with / and not end with it")
        for origin in self.allowed_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                fix = "must be an origin such as https://example.org, or *"
                raise InvalidRequest("allowed_origins", origin, fix)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise InvalidRequest("ssl_keyfile", self.ssl_keyfile, "goes with ssl_certfile; give it, too")
        if self.ssl_certfile is not None:
            self._check_certificate(self.ssl_certfile)

    def _check_certificate(self, certfile: str) -> None:
        for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", self.ssl_keyfile)):
            if path is None:
                continue
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise InvalidRequest(name, path, f"cannot be read: {error.strerror}") from None
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certfile, self.ssl_keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            problem = f"is no certificate with its private key in PEM format, without a password: {error}"
            raise InvalidRequest("ssl_certfile", certfile, problem) from None


def with_key(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ServerOptions`, with the key of the environment if there is one."""
    key = os.environ.get(KEY_VARIABLE)
    return dict(given) if key is None else {**given, "api_key": [*given.get("api_key", []), key]}


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if default parameters of requests are invalid."""
    resolve(dict(defaults))
