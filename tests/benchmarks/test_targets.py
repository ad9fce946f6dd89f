"""Targets of a load: the engine, the ways to serve the twin, servers, vLLM and peers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remask import LLM, AsyncLLM, InvalidRequest, SamplingParams, Unavailable
from remask.benchmarks import workloads
from remask.benchmarks.serving.autoregressive import ContinuousTarget, GenerateTarget, VllmTarget
from remask.benchmarks.serving.load import Run, closed_loop, figures
from remask.benchmarks.serving.peer import ADAPTERS, PeerTarget
from remask.benchmarks.serving.server import ServerTarget, read_answer
from remask.benchmarks.serving.targets import Answer, EngineTarget, Target
from remask.benchmarks.tiny.evaluate import TWIN_DIRECTORY
from remask.benchmarks.tiny.policies import POLICIES
from remask.benchmarks.tiny.tasks import ADDITION
from remask.benchmarks.workloads import Job

JOB = Job([1, 2, 3], SamplingParams(max_tokens=8), "123+456=", ADDITION)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM("tiny", device="cpu", dtype="float32", max_num_rows=512)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def jobs(engine: AsyncLLM) -> list[Job]:
    return workloads.answers(engine.engine.tokenizer, 9, POLICIES["threshold 0.9"])


async def answers(target: Target, jobs: list[Job], concurrency: int) -> list[Answer]:
    run = await closed_loop(target, jobs, concurrency)
    assert not [served.error for served in run.served if served.error]
    by_text = {served.job.text: served.answer for served in run.served}
    return [answer for job in jobs if (answer := by_text[job.text]) is not None]


def test_the_twin_answers_alike_alone_in_padded_batches_and_continuously(jobs: list[Job]) -> None:
    async def all_ways() -> list[list[Answer]]:
        found = []
        async with GenerateTarget(TWIN_DIRECTORY, torch.float32, 4) as target:
            found += [await answers(target, jobs, 1), await answers(target, jobs, 9)]
        async with ContinuousTarget(TWIN_DIRECTORY, torch.float32, 8, jobs) as target:
            found.append(await answers(target, jobs, 9))
        return found

    alone, padded, continuous = asyncio.run(all_ways())
    assert alone == padded == continuous
    for job, answer in zip(jobs, alone, strict=True):
        assert job.puzzle is not None
        if job.puzzle is ADDITION:
            assert job.puzzle.is_correct(job.text or "", answer.text or "")
            assert (answer.num_tokens, answer.nfe) == (4, 5), "and the end"


def test_the_engine_tells_forwards_and_visible_tokens(engine: AsyncLLM, jobs: list[Job]) -> None:
    found = asyncio.run(answers(EngineTarget(engine), jobs, 4))
    with LLM("tiny", device="cpu", dtype="float32", max_num_rows=512) as llm:
        expected = llm.generate([job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False)
    samples = [output.outputs[0] for output in expected]
    assert found == [Answer(s.text, s.num_visible_tokens, s.nfe) for s in samples]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of an OpenAI-compatible server that streams one answer in two parts, and bodies it got."""
    asked: list[dict[str, Any]] = []
    everybody = threading.Barrier(40, timeout=20)

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(json.dumps({"data": [{"id": "twin"}]}), "application/json")

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if asked[-1]["prompt"] == "all at once":
                everybody.wait()
            if asked[-1]["prompt"] == "too long":
                self.send_error(400, "the prompt is too long")
                return
            events: list[dict[str, Any]] = [{"choices": [{"text": part}]} for part in ("", "05", "79")]
            events.append({"choices": [], "usage": {"completion_tokens": 4}})
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self._send("".join([": ping\n\n", *lines, "data: [DONE]\n\n"]), "text/event-stream")
            if asked[-1]["prompt"] == "stays open":
                self.wfile.flush()
                time.sleep(4)

        def _send(self, text: str, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_a_server_is_asked_as_openai_says(server: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = server
    jobs = [JOB, Job([7, 8], JOB.params), Job([1], JOB.params, "too long")]
    found = figures(asyncio.run(closed_loop(ServerTarget(f"{url}/v1/"), jobs, 1)))
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 8)
    assert "status 400" in found["errors"][0]
    assert [body["prompt"] for body in asked] == ["123+456=", [7, 8], "too long"]
    assert {(body["model"], body["max_tokens"], body["stream"]) for body in asked} == {("twin", 8, True)}


def test_a_server_gets_all_requests_of_a_loop_at_once(server: tuple[str, list[Any]]) -> None:
    jobs = [Job([1], JOB.params, "all at once")] * 40
    found = figures(asyncio.run(closed_loop(ServerTarget(server[0]), jobs, 40)))
    assert (found["completed"], found["failed"]) == (40, 0)


TEXT = b'data: {"choices": [{"text": "0579"}]}\n\n'
LAST = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "stream",
    [
        TEXT + USAGE + DONE,
        b"event: message\nid: 7\nretry: 3000\n" + TEXT + USAGE + DONE,
        b"retry: 3000\n\nevent: ping\n\ndata\n\ndata:\n\n: comment\n" + TEXT + USAGE + DONE,
        b'data: {"choices": [\ndata: {"text": "0579"}]}\n\n' + USAGE + DONE,
        TEXT + b'data:{"choices": null, "usage": {"completion_tokens": 4}}\n\n' + DONE,
        TEXT + b'data: {"usage": null}\n\n' + USAGE + b"data: [DONE]\n",
        (b"\xef\xbb\xbf" + TEXT + USAGE + DONE).replace(b"\n", b"\r\n"),
        (TEXT + USAGE + DONE).replace(b"\n", b"\r"),
        TEXT + LAST + USAGE,
    ],
)
def test_legal_event_streams_are_answers(stream: bytes) -> None:
    answer = read_answer(stream.splitlines(keepends=True) if b"\n" in stream else [stream], 0.0)
    assert (answer.text, answer.num_tokens) == ("0579", 4)


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (TEXT + USAGE, r"ended before \[DONE\]"),
        (TEXT + DONE, "does not tell the tokens"),
        (b'{"choices": [{"text": "0579"}]}', "is no event stream"),
        (b"", "is no event stream"),
        (TEXT + b"data: {\n\n" + DONE, "no JSON object"),
        (b"data: [1]\n\n" + DONE, "no JSON object"),
        (TEXT + b'data: {"error": {"message": "out of memory"}}\n\n' + DONE, "reports: .*out of memory"),
        (b'data: {"object": "error", "message": "too long"}\n\n' + DONE, "reports: .*too long"),
    ],
)
def test_a_stream_that_fails_is_reported(stream: bytes, problem: str) -> None:
    with pytest.raises(Unavailable, match=problem):
        read_answer(stream.splitlines(keepends=True), 0.0)


def test_an_answer_ends_at_the_servers_done_event(server: tuple[str, list[Any]]) -> None:
    found = figures(
        asyncio.run(closed_loop(ServerTarget(server[0]), [Job([1], JOB.params, "stays open")], 1))
    )
    assert found["completed"] == 1
    assert found["mean_e2el_ms"] < 2000


class OfflineVllm:
    """vLLM's `LLM` as far as it is used: a step gives every request one token."""

    def __init__(self, model: str, dtype: str, gpu_memory_utilization: float, **options: bool) -> None:
        share = 0.5 if torch.cuda.is_available() else 0.25
        assert (model, dtype, gpu_memory_utilization) == ("twin", "bfloat16", share)
        assert options == {"enable_prefix_caching": False}
        self.llm_engine, self.asked, self.running, self.most = self, [], {}, 0  # type: ignore[var-annotated]
        engines.append(self)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: dict[str, Any]) -> None:
        if prompt.get("prompt_token_ids") == [0]:
            raise ValueError("a zero")
        self.asked.append((prompt, params))
        self.running[request_id] = 5 - 2 * ("prompt" in prompt)
        self.most = max(self.most, len(self.running))

    def step(self) -> list[Any]:
        self.running = {name: left - 1 for name, left in self.running.items()}
        if any(prompt.get("prompt_token_ids") == [13] for prompt, _ in self.asked):
            raise RuntimeError("the engine is dead")
        ended = [name for name, left in self.running.items() if left == 0]
        for name in ended:
            del self.running[name]
        sample = SimpleNamespace(text="0579", token_ids=[5, 6, 7, 8, 1], finish_reason="stop")
        return [SimpleNamespace(request_id=name, finished=True, outputs=[sample]) for name in ended]


engines: list[OfflineVllm] = []


def test_vllm_is_asked_for_greedy_tokens_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(jobs: list[Job]) -> Run:
        async with VllmTarget(Path("twin"), torch.bfloat16, 0.5) as target:
            return await closed_loop(target, jobs, 2)

    with pytest.raises(Unavailable, match=r"vllm is not installed .*pip install vllm"):
        asyncio.run(ask([JOB]))
    final = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    module = SimpleNamespace(LLM=OfflineVllm, SamplingParams=dict, sampling_params=final)
    monkeypatch.setitem(sys.modules, "vllm", module)
    ids, bad, deadly = (Job([number], JOB.params) for number in (7, 0, 13))
    served = asyncio.run(ask([ids, JOB, JOB, bad, JOB])).served
    assert [one.error for one in served if one.answer is None] == ["ValueError: a zero"]
    assert [one.answer for one in served if one.answer is not None] == 4 * [Answer("0579", 4, nfe=5)]
    engine = engines[-1]
    params = {"temperature": 0, "output_kind": 2, "max_tokens": 8}
    assert engine.asked == [({"prompt_token_ids": [7]}, params)] + 3 * [({"prompt": "123+456="}, params)]
    assert engine.most == 2, "one comes while another runs"
    served = asyncio.run(ask([JOB, deadly])).served
    assert {one.error for one in served} == {"RuntimeError: the engine is dead"}


ADAPTER = """
from protocol import serve

def load(model):
    if model.endswith("absent"):
        raise FileNotFoundError(model)
    print("a library prints")

    def answer(requests):
        if any(r["max_tokens"] == 13 for r in requests):
            raise ValueError("thirteen")
        if any(r["max_tokens"] == 14 for r in requests):
            print("last words", flush=True)
            raise SystemExit(3)
        return [{"text": r["text"][::-1], "num_tokens": r["max_tokens"], "nfe": r["steps"]} for r in requests]

    return "mirror", answer

serve(load)
"""


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    (tmp_path / "protocol.py").write_text((ADAPTERS / "protocol.py").read_text())
    (tmp_path / "mirror.py").write_text(ADAPTER)
    return str(tmp_path / "mirror.py")


def test_a_peer_answers_from_a_process_of_its_own(adapter: str) -> None:
    def asked(max_tokens: int, **fields: Any) -> Job:
        return Job([1, 2], SamplingParams(max_tokens=max_tokens, **fields), "ab", None)

    async def ask() -> tuple[str, Run]:
        async with PeerTarget(adapter, Path(sys.executable), Path("model"), 4) as target:
            jobs = [asked(8, unmask="schedule:4"), asked(13), asked(9), asked(14), asked(8)]
            return target.name, await closed_loop(target, jobs, 1)

    name, run = asyncio.run(ask())
    assert name == "mirror"
    first, failed, second, *ended = run.served
    assert first.answer == Answer("ba", 8, nfe=4)
    assert failed.error == "Unavailable: the peer says: ValueError: thirteen"
    assert second.answer == Answer("ba", 9, nfe=None), "and it goes on"
    assert ended[0].error == "Unavailable: the peer has ended with status 3: a library prints\nlast words"
    assert all(served.answer is None for served in ended)


@pytest.mark.slow
def test_a_peer_that_does_not_start_is_reported(adapter: str, tmp_path: Path) -> None:
    python = Path(sys.executable)
    with pytest.raises(Unavailable, match="FileNotFoundError: absent"):
        PeerTarget(adapter, python, Path("absent"), 4)
    with pytest.raises(Unavailable, match="No module named 'dlmserve'"):
        PeerTarget("dlmserve", python, tmp_path, 4)
    with pytest.raises(InvalidRequest, match="did you mean 'dlmserve'"):
        PeerTarget("dlmserv", python, tmp_path, 4)
    with pytest.raises(InvalidRequest, match="peer_python: cannot be run"):
        PeerTarget("dlmserve", tmp_path / "python", tmp_path, 4)
