"""What serving over HTTP costs: `remask serve` against `AsyncLLM` in this process, on the same requests.

    python -m remask.benchmarks.serving.server_cost --output benchmarks/results/server_cost.json

Both have the embedded model in fp32 on one thread. Requests come in a closed loop. The server runs in a
process of its own and streams, and this process reads the streams. In-process requests yield their last
output. Both sides run in turn, and a ratio is taken within a repetition. The added latency is the median of
the differences of requests that follow each other, one at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from remask import AsyncLLM
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import format_spread, spread

ENGINE = {"dtype": "float32", "device": "cpu", "max_num_rows": 2048}
# At least ten forwards, and small answers, whose overheads weigh most.
LOADS: dict[str, dict[str, Any]] = {
    "64 slots, one a forward": {"max_tokens": 64, "block_length": 16, "unmask": "schedule"},
    "8 slots, `threshold:0.9`": {"max_tokens": 8, "block_length": 8, "unmask": "threshold:0.9"},
}
REQUESTS = {1: 8, 16: 32, 64: 64}  # by the number of requests at a time
HEADER = ("requests", "at a time", "in process", "over HTTP", "times as fast (min to max)", "added latency")

Ask = Callable[[int], Awaitable[int]]  # sends the request with this number; returns its visible tokens


class Connection:
    """A connection to a server, for one request after another; opened when it is needed."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def tokens(self, body: dict[str, Any]) -> int:
        """Sends a streamed completion and reads it to its end; returns its visible tokens."""
        if self._streams is None or self._streams[0].at_eof():  # the server closes idle connections
            self._streams = await asyncio.open_connection(self._address.hostname, self._address.port)
        reader, writer = self._streams
        content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        if not (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 "):
            raise RuntimeError("the server has refused a request")
        num_tokens = 0
        while size := int(await reader.readline(), 16):  # chunked
            data = await reader.readexactly(size + 2)
            if b'"usage":{' in data:
                num_tokens = json.loads(data.partition(b"data: ")[2])["usage"]["completion_tokens"]
        await reader.readexactly(2)
        return num_tokens

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


@contextmanager
def server() -> Iterator[str]:
    """A server process with the embedded model; its address."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    command = [
        sys.executable,
        "-c",
        "from remask.cli import main; main()",
        "serve",
        "tiny",
        "--port",
        "0",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r" at (http://\S+)$", line):
                    yield found.group(1)
                    return
            raise RuntimeError(f"the server has not started: {''.join(lines)}")
        finally:
            process.terminate()
            process.wait()


def body_of(params: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "prompt": f"{100 + number % 900}+{7 * number % 900}=",
        "ignore_eos": True,
        "seed": number,
        **params,
    }


async def closed_loop(asks: list[Ask], count: int) -> float:
    """Visible tokens a second of callers that take the next request in turn."""
    numbers, num_tokens = iter(range(count)), 0

    async def caller(ask: Ask) -> None:
        nonlocal num_tokens
        for number in numbers:
            own = await ask(number)
            num_tokens += own

    started = time.perf_counter()
    await asyncio.gather(*map(caller, asks))
    return num_tokens / (time.perf_counter() - started)


async def measure(llm: AsyncLLM, url: str, repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    results = []
    for name, params in LOADS.items():

        async def in_process(number: int, params: dict[str, Any] = params) -> int:
            body = body_of(params, number)
            async for output in llm.generate(body.pop("prompt"), body):
                return output.outputs[0].num_visible_tokens
            raise RuntimeError("the engine has ended")

        for concurrency, count in REQUESTS.items():
            rates: list[tuple[float, float]] = []
            added: list[float] = []
            own = [Connection(url) for _ in range(concurrency)]

            def over_http(connection: Connection, params: dict[str, Any] = params) -> Ask:
                return lambda number: connection.tokens(body_of(params, number))

            sides = [[in_process] * concurrency, [over_http(each) for each in own]]
            for repetition in range(repetitions):
                order = (0, 1) if repetition % 2 else (1, 0)
                found = {side: await closed_loop(sides[side], count) for side in order}
                rates.append((found[0], found[1]))
                if concurrency == 1:
                    added += await differences(in_process, sides[1][0], count)
                steadiness.look()
            for each in own:
                each.close()
            results.append(
                {
                    "load": name,
                    "max_concurrency": concurrency,
                    "num_requests": count,
                    "in_process_tokens_per_second": spread([rate for rate, _ in rates]),
                    "served_tokens_per_second": spread([rate for _, rate in rates]),
                    "ratio": spread([served / rate for rate, served in rates]),
                    "added_latency_ms": 1000 * statistics.median(added) if added else None,
                }
            )
    return results


async def differences(in_process: Ask, over_http: Ask, count: int) -> list[float]:
    """How many seconds longer each of some requests takes over HTTP."""
    found = []
    for number in range(count):
        sides = [(-1, in_process), (1, over_http)]
        difference = 0.0
        for sign, ask in sides if number % 2 else sides[::-1]:  # no side is always the second
            started = time.perf_counter()
            await ask(number)
            difference += sign * (time.perf_counter() - started)
        found.append(difference)
    return found


def cells_of(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    added = result["added_latency_ms"]
    return [
        result["load"],
        str(result["max_concurrency"]),
        f"{result['in_process_tokens_per_second']['median']:.0f} tokens/s",
        f"{result['served_tokens_per_second']['median']:.0f} tokens/s",
        format_spread(result["ratio"]),
        "" if added is None else f"{added:.1f} ms",
    ]


def main() -> None:
    async def every(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
        with server() as url:
            async with await AsyncLLM.start("tiny", **ENGINE) as llm:
                return await measure(llm, url, repetitions, steadiness)

    repeated.run(
        __doc__, HEADER, cells_of, lambda repetitions, steadiness: asyncio.run(every(repetitions, steadiness))
    )


if __name__ == "__main__":
    main()
