"""The server on Ray Serve: its answers, and streams that go on if a replica dies or leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray

from remask import LLM
from remask.benchmarks.serving.ray_serve import free_port, replicas

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ENGINE: dict[str, Any] = {"device": "cpu", "max_num_rows": 256, "batch_invariant": True, "burst": 2}
ASK: dict[str, Any] = {"max_tokens": 36, "block_length": 6, "unmask": "schedule"}
HARD = "513264.26..12.1..33...2.1.25......1.="
SECONDS = 120.0


def app(num_replicas: int) -> Any:
    from remask.ray import build_app

    deployment = {"num_replicas": num_replicas, "graceful_shutdown_timeout_s": 20}
    server = {"api_key": ["secret"], "served_model_name": ["sudoku"]}
    return build_app(
        {"model": "tiny", "engine_kwargs": ENGINE, "server_kwargs": server, "deployment_config": deployment}
    )


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, httpx.Client]]:
    """A handle of the application, and a client of it."""
    from ray import serve

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": port})
    handle = serve.run(app(2), name="remask", route_prefix="/")
    headers = {"authorization": "Bearer secret"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=SECONDS) as client:
        yield handle, client
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The undisturbed texts, by seed."""
    with LLM("tiny", **ENGINE) as llm:
        params = [{**ASK, "temperature": 1.0, "seed": seed} for seed in range(16)]
        return [output.outputs[0].text or "" for output in llm.generate([HARD] * 16, params)]


def stream(client: httpx.Client, seed: int) -> str:
    """The text of a stream, which must not break."""
    body = {"prompt": HARD, **ASK, "temperature": 1.0, "seed": seed, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert not any("error" in chunk for chunk in chunks), chunks
    assert len(chunks) == 6, "a chunk a block, whoever has run it"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_it_answers_as_the_server_does(served: tuple[Any, httpx.Client], texts: list[str]) -> None:
    handle, client = served
    body = {"prompt": HARD, **ASK, "temperature": 1.0, "seed": 3}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == texts[3]
    assert response.json()["model"] == "sudoku"
    assert stream(client, 3) == texts[3]
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
    refused = client.post("/v1/completions", json={**body, "unmask": "thresold"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "unmask")
    seeds = {
        client.post("/v1/completions", json={**body, "seed": None}).json()["choices"][0]["seed"]
        for _ in range(3)
    }
    assert len(seeds) == 3, "the ingress draws them"
    assert "remask:denoising_steps_total" in client.get("/metrics").text
    params = {name: value for name, value in body.items() if name != "prompt"}
    outputs = handle.options(stream=True).generate.remote(HARD, params, output_kind="delta")
    assert "".join(sample.text for output in outputs for sample in output.outputs) == texts[3]


def test_streams_go_on_if_a_replica_dies_or_leaves(
    served: tuple[Any, httpx.Client], texts: list[str]
) -> None:
    from ray import serve

    _, client = served
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(stream, client, seed) for seed in [*range(16)] * 2]
        time.sleep(1.0)
        victim, _ = replicas()
        os.kill(victim, signal.SIGKILL)
        assert [own.result(SECONDS) for own in running] == texts * 2
    deadline = time.monotonic() + SECONDS
    while len(replicas()) < 2:  # Serve starts another one
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert victim not in replicas()
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(stream, client, seed) for seed in [*range(16)] * 2]
        serve.run(app(1), name="remask", route_prefix="/")
        assert [own.result(SECONDS) for own in running] == texts * 2
    while len(replicas()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
