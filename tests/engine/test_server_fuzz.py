"""Bodies that no client should send: none fails the server, and requests beside them are not harmed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Running, running

from remask import AsyncLLM

pytestmark = pytest.mark.slow

GOOD: dict[str, Any] = {"prompt": "12..34..2.4.43.1=", "max_tokens": 16, "block_length": 16, "seed": 1}
TEXT = "1234341221434321"
PATHS = {
    "/v1/completions": "CompletionBody",
    "/v1/chat/completions": "ChatBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
}
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    -(2**63),
    2**70,
    0.5,
    -0.0,
    1e308,
    1e-320,
    "",
    "a",
    "\0",
    "ü\u202e",
    "x" * 5000,
    "\ud800",
    [],
    [[]],
    [None],
    [1, 2],
    [-1],
    ["a", "b"],
    ["a", 1],
    {},
    {"type": "wino"},
    {"a": {"b": []}},
    DEEP,
    "wino",
    "wino:0.9",
    "wino:9",
    "threshold:0.5",
    "threshold:nan",
    "schedule:0",
    "dream:4",
    "remdm:3,cap,0.1",
    "saber",
    "random:t2=0.9",
    "oracle_loo:0.9",
    {"type": "threshold", "t": 0.3},
    {"type": "threshold", "t": "x"},
    {"include_usage": True, "canvas": True},
    {"canvas": 3},
    {"5": -1.5},
    {"5": 1e300},
    {"-1": 1},
    {"x": 1},
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": "text", "text": "1+2="}]}],
    [{"role": "robot"}],
    "../../etc/passwd",
    "tiny",
    "<|mdm_mask|>",
    "<|endoftext|>",
    "fast-dllm",
    "proposal",
    "top",
]


class Bodies:
    """Random bodies of the described endpoints."""

    def __init__(self, description: dict[str, Any], seed: int) -> None:
        schemas = description["components"]["schemas"]
        self._names = {path: list(schemas[name]["properties"]) for path, name in PATHS.items()}
        self._random = random.Random(seed)

    def one(self) -> tuple[str, bytes]:
        """A path and a body."""
        r = self._random
        path = r.choice(list(PATHS))
        fields: dict[str, Any] = {}
        if r.random() < 0.8:  # most have what is needed, so that other fields are looked at
            fields = {"max_tokens": r.choice([1, 4, 8, 16]), "prompt": "1+2=", "ignore_eos": r.random() < 0.5}
            if "chat" in path:
                fields["messages"] = [{"role": "user", "content": fields.pop("prompt")}]
            if "tokenize" in path:
                fields = {"tokens": [1, 2]} if "detokenize" in path else {"prompt": "a"}
        for _ in range(r.randrange(4)):
            name = (
                r.choice(self._names[path])
                if r.random() < 0.95
                else r.choice(["", "x", "__class__", "model "])
            )
            fields[name] = r.choice(VALUES)
        content = json.dumps(fields).encode()
        if r.random() < 0.1:
            cut = r.randrange(len(content))
            content = (
                content[:cut] + bytes(r.randrange(256) for _ in range(r.randrange(5))) + content[cut + 1 :]
            )
        return path, content


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = AsyncLLM("tiny", device="cpu", max_num_rows=512, max_tokens_per_call=64, max_n=4)
    with running(llm, max_body_bytes=100_000) as own:
        yield own
    llm.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def send(url: str, bodies: Bodies, count: int) -> list[tuple[int, str, bytes]]:
    """Sends bodies, some at a time, with good requests between them; the statuses."""
    found: list[tuple[int, str, bytes]] = []
    headers = {"content-type": "application/json"}

    async def caller(client: httpx.AsyncClient, number: int) -> None:
        while len(found) < count:
            path, content = bodies.one()
            response = await client.post(path, content=content, headers=headers)
            found.append((response.status_code, path, content))
            if response.status_code >= 400:
                assert response.json()["error"]["message"], content
            if number == 0:
                good = await client.post("/v1/completions", json=GOOD)
                assert good.json()["choices"][0]["text"] == TEXT
                assert (await client.get("/health")).status_code == 200

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(caller(client, number) for number in range(8)))
    return found


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_body_fails_the_server(server: Running, count: int) -> None:
    bodies = Bodies(server.client.get("/openapi.json").json(), seed=count)
    asyncio.run(send(server.url, bodies, count // 4))  # caches are filled
    before = resident_bytes()
    found = asyncio.run(send(server.url, bodies, count))
    failed = [own for own in found if own[0] >= 500 and own[0] != 503]
    assert failed == []
    statuses = {status for status, _, _ in found}
    assert {200, 400} <= statuses
    assert sum(status == 200 for status, _, _ in found) > count / 10
    assert resident_bytes() - before < 64 * 2**20
    assert server.llm.engine.num_live == 0
