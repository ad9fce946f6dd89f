"""`remask serve` as a process: what it says before the port opens, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from remask import AsyncLLM, EngineOptions
from remask.benchmarks.serving.server_cost import serving

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "prompt": "1+2=",
    "max_tokens": 200,
    "block_length": 8,
    "unmask": "schedule",
    "ignore_eos": True,
}
SECONDS = 120.0


def test_what_cannot_start_says_so_in_one_line(
    remask: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*arguments: str) -> str:
        done = remask("serve", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        *_, last = done.stderr.splitlines()
        assert last.startswith("remask: error: ")
        return last

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "port: cannot be bound" in refusal("tiny", "--port", str(taken.getsockname()[1]))
    assert "model: " in refusal("/no/such/model", "--port", "0")
    assert "ssl_certfile: cannot be read" in refusal("tiny", "--ssl-certfile", str(tmp_path / "none.pem"))
    assert "unmask: " in refusal("tiny", "--port", "0", "--unmask", "thresold:0.9")
    assert "uds: cannot be bound" in refusal("tiny", "--uds", str(tmp_path / "no" / "folder"))
    monkeypatch.setenv("REMASK_API_KEY", "")
    assert "api_key: is empty" in refusal("tiny", "--port", "0")


def test_a_port_that_is_taken_while_the_model_loads_is_told_in_one_line(
    remask: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))  # as another server that loads its model
        load = AsyncLLM.from_options

        def slowly(options: EngineOptions) -> AsyncLLM:
            other.listen()
            return load(options)

        monkeypatch.setattr(AsyncLLM, "from_options", slowly)
        done = remask("serve", "tiny", "--max-num-rows", "512", "--port", str(other.getsockname()[1]))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == done.stderr.splitlines()[-1:]
    assert "port: was taken while the model was loaded" in done.stderr


def test_a_signal_ends_the_server_after_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving("tiny", "--max-num-rows", "512", "--uds", str(path)) as (own, address):
        assert address == f"unix:{path}"
        transport = httpx.HTTPTransport(uds=str(path))
        client = httpx.Client(transport=transport, base_url="http://remask", timeout=SECONDS)
        with client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            own.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert client.get("/ready").status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert own.wait(10) == 0
        assert not path.exists()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    files = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        serving("tiny", "--max-num-rows", "512", *files, REMASK_API_KEY="secret") as (own, url),
        httpx.Client(verify=context, base_url=url, timeout=SECONDS) as client,
    ):
        assert url.startswith("https://")
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer secret"
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()  # dropping it would close the connection
            next(lines)
            own.send_signal(signal.SIGINT)
            time.sleep(0.2)
            own.send_signal(signal.SIGINT)
            assert own.wait(2) != 0
