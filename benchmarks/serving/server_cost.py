"""What serving over HTTP costs: `remask serve` against `AsyncLLM` in this process, on the same requests.

    python -m remask.benchmarks.serving.server_cost --output benchmarks/results/server_cost.json

Both have the embedded model in fp32 on one thread. Requests come in a closed loop. The server runs in a
process of its own and streams, and this process reads the streams. In-process requests yield their last
output. Both sides run in turn, and a ratio is taken within a repetition. Latencies are medians of requests
that follow each other, one at a time, on both sides. The added latency is the difference of what a request
takes beyond the engine's own time, over HTTP and in process, because the engine's time varies by more.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import msgspec

from remask import AsyncLLM, SamplingParams
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.serving.load import Run, closed_loop, figures
from remask.benchmarks.serving.targets import Answer, EngineTarget, Target
from remask.benchmarks.throughput import format_spread, spread
from remask.benchmarks.workloads import Job
from remask.engine import Progress
from remask.scheduler.messages import StepResult
from remask.thread import Observer

ENGINE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_rows": 2048}
REQUESTS = {1: 8, 16: 32, 64: 128}  # by the number of requests at a time


class Load(NamedTuple):
    """Requests.

    Attributes:
        params: their parameters.
        requests: how many, by the number at a time.
        pairs: how many of them compare latencies, in a repetition.
    """

    params: SamplingParams
    requests: dict[int, int]
    pairs: int


def schedule(unmask: str) -> SamplingParams:
    return SamplingParams(max_tokens=64, block_length=16, unmask=unmask, ignore_eos=True)


LOADS = {
    "64 slots in 12 forwards": Load(schedule("schedule:12"), {1: 8}, pairs=24),
    # Small answers, whose overheads weigh most.
    "8 slots, `threshold:0.9`": Load(
        SamplingParams(max_tokens=8, block_length=8, unmask="threshold:0.9", ignore_eos=True),
        REQUESTS,
        pairs=24,
    ),
    "64 slots, one a forward": Load(schedule("schedule"), REQUESTS, pairs=8),
}
HEADER = (
    *("requests", "at a time", "in process", "over HTTP", "times as fast (min to max)"),
    *("median latency, in process and over HTTP", "added latency"),
)


class Latency(NamedTuple):
    """Seconds of one request, on one side.

    Attributes:
        whole: all of them.
        beyond: those beyond the engine's own.
    """

    whole: float
    beyond: float


class StreamTarget(Target):
    """`remask serve`, which gets all parameters of a job and streams. Connections are used again.

    The client costs little, because it shares a core with the server that is measured: it looks for the usage
    alone.
    """

    name = "remask serve"

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def answer(self, job: Job) -> Answer:
        fields = {
            name: value for name, value in msgspec.structs.asdict(job.params).items() if value is not None
        }
        options = {"include_usage": True}
        content = json.dumps(
            {"prompt": job.prompt, "stream": True, "stream_options": options, **fields}
        ).encode()
        reader, writer = await self._connection()
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
        self._idle.append((reader, writer))
        return Answer(None, num_tokens)

    def engine_seconds(self) -> float:
        """The engine's seconds of all requests that the server has answered."""
        with urlopen(f"{self._address.geturl()}/metrics") as response:
            (found,) = re.findall(rb"^remask:e2e_request_latency_seconds_sum\S* (\S+)", response.read(), re.M)
        return float(found)

    async def __aexit__(self, *_: object) -> None:
        for _reader, writer in self._idle:
            writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            streams = self._idle.pop()
            if not streams[0].at_eof():  # the server closes what is idle for long
                return streams
        return await asyncio.open_connection(self._address.hostname, self._address.port)


class EngineSeconds(Observer):
    """Sums the engine's seconds of all requests that have ended, as `total`."""

    def __init__(self) -> None:
        self.total = 0.0

    def heard(self, found: Sequence[Progress], result: StepResult | None) -> None:
        now = time.monotonic()
        self.total += sum(now - progress.arrival_time for progress in found if progress.has_ended)


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `remask serve` whose port is open, and its address; killed if it has not ended."""
    command = [
        sys.executable,
        "-c",
        "from remask.cli import main; main()",
        "serve",
        *arguments,
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"serves \S+ at (\S+)$", line):
                    yield process, found.group(1)
                    return
            raise RuntimeError(f"the server has not started: {''.join(lines)}")
        finally:
            process.kill()


def jobs_of(llm: AsyncLLM, params: SamplingParams, count: int) -> list[Job]:
    """Sums, each with a seed of its own."""
    texts = (f"{100 + number % 900}+{7 * number % 900}=" for number in range(count))
    encode = llm.engine.intake.encode
    return [
        Job(encode("prompt", text, add_special_tokens=True), msgspec.structs.replace(params, seed=number))
        for number, text in enumerate(texts)
    ]


async def run(target: Target, jobs: Sequence[Job], concurrency: int) -> Run:
    """Serves jobs, of which none may fail."""
    found = await closed_loop(target, jobs, concurrency)
    if errors := [served.error for served in found.served if served.error is not None]:
        raise RuntimeError(errors[0])
    return found


async def measure(llm: AsyncLLM, url: str, repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    results = []
    in_process = EngineTarget(llm)
    async with StreamTarget(url) as over_http:
        for name, load in LOADS.items():
            for concurrency, count in load.requests.items():
                jobs = jobs_of(llm, load.params, max(count, load.pairs))
                rates: list[tuple[float, float]] = []
                pairs: list[tuple[Latency, Latency]] = []
                for repetition in range(repetitions):
                    order = (in_process, over_http) if repetition % 2 else (over_http, in_process)
                    found = {
                        target: figures(await run(target, jobs[:count], concurrency)) for target in order
                    }
                    own, served = (found[target]["output_throughput"] for target in (in_process, over_http))
                    rates.append((own, served))
                    if concurrency == 1:
                        pairs += await latencies(llm, in_process, over_http, jobs[: load.pairs])
                    steadiness.look()
                results.append(
                    {
                        "load": name,
                        "max_concurrency": concurrency,
                        "num_requests": count,
                        "in_process_tokens_per_second": spread([own for own, _ in rates]),
                        "served_tokens_per_second": spread([served for _, served in rates]),
                        "ratio": spread([served / own for own, served in rates]),
                        **(latency_figures(pairs) if pairs else {}),
                    }
                )
    return results


def latency_figures(pairs: Sequence[tuple[Latency, Latency]]) -> dict[str, float]:
    """Medians, in milliseconds, of the same requests in process and over HTTP."""
    return {
        "in_process_latency_ms": 1000 * statistics.median(own.whole for own, _ in pairs),
        "served_latency_ms": 1000 * statistics.median(served.whole for _, served in pairs),
        "added_latency_ms": 1000 * statistics.median(served.beyond - own.beyond for own, served in pairs),
    }


async def latencies(
    llm: AsyncLLM, in_process: Target, over_http: StreamTarget, jobs: Sequence[Job]
) -> list[tuple[Latency, Latency]]:
    """What each of some requests takes in process and over HTTP. No side is always the first."""
    llm.engine.observer = own = EngineSeconds()
    sides = {in_process: lambda: own.total, over_http: over_http.engine_seconds}
    found = []
    for number, job in enumerate(jobs):
        took: dict[Target, Latency] = {}
        for target in list(sides)[:: 1 if number % 2 else -1]:
            before = sides[target]()
            seconds = (await run(target, [job], 1)).served[0].latency
            took[target] = Latency(seconds, seconds - (sides[target]() - before))
        found.append((took[in_process], took[over_http]))
    llm.engine.observer = None
    return found


def cells_of(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    latency = ("in_process_latency_ms", "served_latency_ms", "added_latency_ms")
    figures = [result.get(name) for name in latency]
    own, served, added = ("" if found is None else f"{found:.1f} ms" for found in figures)
    return [
        result["load"],
        str(result["max_concurrency"]),
        f"{result['in_process_tokens_per_second']['median']:.0f} tokens/s",
        f"{result['served_tokens_per_second']['median']:.0f} tokens/s",
        format_spread(result["ratio"]),
        f"{own}, {served}" if own else "",
        added,
    ]


def main() -> None:
    async def every(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
        with serving("tiny", *flags, OMP_NUM_THREADS="1") as (_, url):
            async with await AsyncLLM.start("tiny", **ENGINE) as llm:
                return await measure(llm, url, repetitions, steadiness)

    repeated.run(
        __doc__, HEADER, cells_of, lambda repetitions, steadiness: asyncio.run(every(repetitions, steadiness))
    )


if __name__ == "__main__":
    main()
