"""What stands before the endpoints of `remask serve`: keys, sizes, types, origins and request ids."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Running, running

from remask import AsyncLLM, InvalidRequest, Unavailable
from remask.benchmarks.serving.serve_load import LoadOptions, measure
from remask.server.app import Served, make_app
from remask.server.gate import OPEN_PATHS
from remask.server.options import ServerOptions, check_defaults

KEYS = ["first-key", "second-key"]
BODY = {"prompt": "1+2=", "max_tokens": 4}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    own = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    yield own
    own.close()


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Running]:
    with running(llm, api_key=KEYS, max_body_bytes=2000, allowed_origins=["https://example.org"]) as own:
        yield own


def key(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def test_a_key_is_wanted_but_where_nothing_of_clients_is_told(server: Running) -> None:
    for path in ("/v1/models", "/v1/completions", "/metrics", "/tokenize", "/openapi.json", "/no/such/path"):
        for headers in (
            {},
            key("wrong"),
            {"authorization": "Bearer"},
            {"authorization": KEYS[0]},
            {"authorization": "Basic x"},
        ):
            response = server.client.get(path, headers=headers)
            assert response.status_code == 401, (path, headers)
            assert response.json()["error"]["code"] == "invalid_api_key"
    for path in OPEN_PATHS:
        assert server.client.get(path).status_code == 200
    for own in KEYS:
        assert server.client.get("/v1/models", headers=key(own)).status_code == 200
        response = server.client.post("/v1/completions", json=BODY, headers=key(own))
        assert response.status_code == 200


def test_headers_have_a_ceiling_however_they_arrive(server: Running) -> None:
    for size, status in ((20_000, 200), (40_000, 431)):  # h11 refuses heads that arrive in pieces by itself
        headers = {**key(KEYS[0]), "x-filler": "x" * size}
        assert server.client.get("/v1/models", headers=headers).status_code == status


def test_a_body_must_be_json_by_its_type_and_not_too_long(server: Running) -> None:
    headers = {**key(KEYS[0]), "content-type": "text/plain"}
    response = server.client.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["param"] == "content-type"
    long = {**BODY, "prompt": "1" * 3000}
    response = server.client.post("/v1/completions", json=long, headers=key(KEYS[0]))
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "body")
    assert "max_body_bytes 2000" in error["message"]
    chunks = (b" " * 500 for _ in range(10))  # without a length
    headers["content-type"] = "application/json"
    assert server.client.post("/v1/completions", content=chunks, headers=headers).status_code == 413
    assert server.client.get("/health").status_code == 200


def test_a_load_is_sent_with_the_key(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    load = LoadOptions(target=str(server.client.base_url), num_prompts=1, max_concurrency=1)
    with pytest.raises(Unavailable, match="401"):
        measure(load)
    assert measure(dataclasses.replace(load, api_key=KEYS[1]))["completed"] == 1


def test_an_application_needs_no_more_than_an_engine(llm: AsyncLLM) -> None:
    def status(options: ServerOptions, **headers: str) -> int:
        transport = httpx.ASGITransport(make_app(Served(llm, options)))

        async def ask() -> int:
            async with httpx.AsyncClient(transport=transport, base_url="http://own") as client:
                return (await client.post("/v1/completions", json=BODY, headers=headers)).status_code

        return asyncio.run(ask())

    assert status(ServerOptions()) == 200
    assert status(ServerOptions(api_key=KEYS)) == 401
    assert status(ServerOptions(api_key=KEYS), **key(KEYS[0])) == 200
    with pytest.raises(InvalidRequest, match="max_body_bytes"):
        Served(llm, ServerOptions(max_body_bytes=0))
    with pytest.raises(InvalidRequest, match="temperature"):
        Served(llm, defaults={"temperature": -1})


def test_a_request_id_is_the_clients_if_it_can_be_printed(server: Running) -> None:
    for given, kept in (("mine-7", True), ("x" * 129, False), ("", False), ("a\tb", False)):
        headers = {**key(KEYS[0]), "x-request-id": given}
        response = server.client.post("/v1/completions", json=BODY, headers=headers)
        own = response.headers["x-request-id"]
        assert (own == given) == kept
        assert response.json()["id"] == f"cmpl-{own}"
    assert server.client.get("/nowhere", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_only_named_origins_may_read_responses(server: Running, llm: AsyncLLM) -> None:
    name = "access-control-allow-origin"
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert server.client.options("/v1/completions", headers=asked).headers[name] == "https://example.org"
    response = server.client.get("/health", headers={"origin": "https://evil.example"})
    assert response.headers.get(name) != "https://evil.example"
    with running(llm) as without:
        assert name not in without.client.get("/health", headers={"origin": "https://example.org"}).headers


def test_a_root_path_is_not_part_of_the_endpoints_paths(llm: AsyncLLM) -> None:
    with running(llm, api_key=KEYS, root_path="/models/a") as server:
        assert server.client.get("/ready").status_code == 200
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/v1/models", headers=key(KEYS[1])).status_code == 200


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"api_key": [""]}, "api_key"),
        ({"api_key": ["ok", " spaced "]}, "api_key"),
        ({"port": 65536}, "port"),
        ({"host": ""}, "host"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"root_path": "v1/"}, "root_path"),
        ({"allowed_origins": ["example.org"]}, "allowed_origins"),
        ({"served_model_name": [""]}, "served_model_name"),
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile"),
        ({"ssl_certfile": "/no/such/file.pem"}, "ssl_certfile"),
    ],
)
def test_an_invalid_option_is_refused_by_name(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{parameter}: ") as caught:
        ServerOptions(**options).check()
    assert "spaced" not in str(caught.value), "a key is not shown"


def test_invalid_defaults_of_requests_are_refused() -> None:
    check_defaults({"unmask": "schedule", "temperature": 0.5})
    with pytest.raises(InvalidRequest, match=r"^unmask: "):
        check_defaults({"unmask": "thresold:0.9"})


def test_a_certificate_is_checked_with_its_key(tmp_path: Path) -> None:
    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*command, "-keyout", private, "-out", certificate], check=True, capture_output=True)
    ServerOptions(ssl_certfile=str(certificate), ssl_keyfile=str(private)).check()
    with pytest.raises(InvalidRequest, match=r"ssl_certfile: is no certificate"):
        ServerOptions(ssl_certfile=str(certificate)).check()
