"""Loads and what they are put on: arrivals, loops, figures, targets, and the comparison with the twin."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remask import AsyncLLM, InvalidRequest, SamplingParams, Unavailable
from remask.benchmarks import report, workloads
from remask.benchmarks.serving import compare, serve_load
from remask.benchmarks.serving.autoregressive import ContinuousTarget, GenerateTarget, VllmTarget
from remask.benchmarks.serving.load import Run, Served, arrival_times, closed_loop, figures, open_loop
from remask.benchmarks.serving.peer import ADAPTERS, PeerTarget
from remask.benchmarks.serving.serve_load import LoadOptions, measure
from remask.benchmarks.serving.server import ServerTarget
from remask.benchmarks.serving.targets import Answer, EngineTarget, Target
from remask.benchmarks.tiny.evaluate import TWIN_DIRECTORY
from remask.benchmarks.tiny.policies import POLICIES
from remask.benchmarks.tiny.tasks import ADDITION
from remask.benchmarks.workloads import Job

JOB = Job([1, 2, 3], SamplingParams(max_tokens=8), "123+456=", ADDITION)


def test_arrivals_have_their_rate_and_their_burstiness() -> None:
    for burstiness, variation in ((1.0, 1.0), (0.25, 2.0), (4.0, 0.5)):
        times = arrival_times(20_001, 5.0, burstiness, seed=1)
        gaps = np.diff(times)
        assert times[0] == 0.0
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    assert arrival_times(9, 1.0, seed=1) == arrival_times(9, 1.0, seed=1) != arrival_times(9, 1.0, seed=2)


class Counting(Target):
    """Answers after a moment, or never well; knows how many it had at once."""

    name = "counting"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = self.most = self.started = 0

    async def answer(self, job: Job) -> Answer:
        self.now, self.started = self.now + 1, self.started + 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        if len(job.prompt) == 1:
            raise ValueError("one token is too few")
        return Answer("0579", 4, nfe=2)

    async def __aexit__(self, *_: object) -> None: ...


def test_a_closed_loop_keeps_so_many_under_way_and_serves_all() -> None:
    target = Counting(0.01)
    told: list[Served] = []
    run = asyncio.run(closed_loop(target, [JOB] * 10, 3, told.append))
    assert (target.most, target.started, run.served) == (3, 10, told)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    target = Counting(0.3)
    run = asyncio.run(open_loop(target, [JOB] * 5, [0.0, 0.02, 0.04, 0.06, 0.08]))
    assert target.most == 5
    assert 0.35 < run.duration < 1.0


def test_a_failed_request_is_counted_and_harms_no_other() -> None:
    jobs = [JOB, Job([1], JOB.params), JOB]
    found = figures(asyncio.run(closed_loop(Counting(0.0), jobs, 2)))
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["errors"] == ["ValueError: one token is too few"]
    assert found["total_output_tokens"] == 8


def test_figures_are_those_of_the_answers() -> None:
    def served(latency: float, num_tokens: int, nfe: int, first: float | None, text: str = "0579") -> Served:
        return Served(JOB, latency, Answer(text, num_tokens, nfe, first))

    found = figures(Run([served(1.0, 5, 2, 0.2), served(3.0, 9, 4, 1.4, "0580")], duration=4.0))
    expected = {
        "duration": 4.0,
        "completed": 2,
        "total_input_tokens": 6,
        "total_output_tokens": 14,
        "request_throughput": 0.5,
        "output_throughput": 3.5,
        "total_token_throughput": 5.0,
        "mean_e2el_ms": 2000.0,
        "median_e2el_ms": 2000.0,
        "p99_e2el_ms": 2980.0,
        "mean_ttft_ms": 800.0,
        "mean_tpot_ms": 200.0,
        "nfe": 6,
        "tokens_per_forward": 2.333,
        "solved": 0.5,
    }
    assert {name: found[name] for name in expected} == expected
    whole = figures(Run([served(2.0, 5, 2, None)], duration=2.0))
    assert whole["mean_ttft_ms"] == 2000.0
    assert "mean_tpot_ms" not in whole, "nothing was streamed"


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM("tiny", device="cpu", dtype="float32", max_num_rows=512)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def jobs(engine: AsyncLLM) -> list[Job]:
    return workloads.answers(engine._llm.tokenizer, 9, POLICIES["threshold 0.9"])


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
    expected = engine._llm.generate(
        [job.prompt for job in jobs], [job.params for job in jobs], use_tqdm=False
    )
    found = asyncio.run(answers(EngineTarget(engine), jobs, 4))
    samples = [output.outputs[0] for output in expected]
    assert found == [Answer(s.text, s.num_visible_tokens, s.nfe) for s in samples]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server that streams one answer in two parts; what it was asked."""
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
    assert found["mean_tpot_ms"] < found["mean_ttft_ms"]
    assert "status 400" in found["errors"][0]
    assert [body["prompt"] for body in asked] == ["123+456=", [7, 8], "too long"]
    assert {(body["model"], body["max_tokens"], body["stream"]) for body in asked} == {("twin", 8, True)}


def test_a_server_gets_as_many_requests_at_once_as_it_shall(server: tuple[str, list[Any]]) -> None:
    jobs = [Job([1], JOB.params, "all at once")] * 40
    found = figures(asyncio.run(closed_loop(ServerTarget(server[0]), jobs, 40)))
    assert (found["completed"], found["failed"]) == (40, 0)


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

    with pytest.raises(InvalidRequest, match="pip install vllm"):
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


def test_a_peer_that_does_not_start_is_told(adapter: str, tmp_path: Path) -> None:
    python = Path(sys.executable)
    with pytest.raises(Unavailable, match="FileNotFoundError: absent"):
        PeerTarget(adapter, python, Path("absent"), 4)
    with pytest.raises(Unavailable, match="No module named 'dlmserve'"):
        PeerTarget("dlmserve", python, tmp_path, 4)
    with pytest.raises(InvalidRequest, match="did you mean 'dlmserve'"):
        PeerTarget("dlmserv", python, tmp_path, 4)
    with pytest.raises(InvalidRequest, match="peer_python: cannot be run"):
        PeerTarget("dlmserve", tmp_path / "python", tmp_path, 4)


def test_a_server_that_is_not_there_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9 does not answer"):
        measure(LoadOptions(target="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"target": "vlm"}, "target"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"peer": "dlmserve"}, "peer_python"),
        ({"dtype": "float8"}, "dtype"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 5000}, "max_concurrency"),
        ({"max_concurrency": 4, "request_rate": 2.0}, "request_rate"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"request_rate": math.nan}, "request_rate"),
        ({"burstiness": -1.0}, "burstiness"),
    ],
)
def test_an_impossible_load_is_refused_by_name(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        measure(LoadOptions(**options))
    assert error.value.parameter == parameter


def test_a_load_is_measured_on_each_target(tmp_path: Path) -> None:
    for target in ("remask", "generate"):
        found = measure(LoadOptions(target=target, num_prompts=6, max_concurrency=3))
        assert (found["completed"], found["failed"], found["benchmark"]) == (6, 0, "serve-load")
        assert found["solved"] >= 0.5
    (tmp_path / "load.json").write_text(json.dumps(found))
    files = report.write([tmp_path / "load.json"], tmp_path / "page" / "index.html")
    page = files[0].read_text()
    assert "transformers generate" in page
    assert "p99_e2el_ms" in page
    assert files[1].read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_load_keeps_what_has_come_back() -> None:
    kept: list[dict[str, Any]] = []

    async def interrupted() -> None:
        told = 0

        def count() -> None:
            nonlocal told
            told += 1
            if told == 3:
                task.cancel()

        options = LoadOptions(num_prompts=40, max_concurrency=2)
        task = asyncio.create_task(serve_load._measure(options, count, kept.append))
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    (found,) = kept
    assert 3 <= found["completed"] < 40
    assert found["notes"][0] == f"Not finished: {found['completed']} of 40 requests."
    assert found["gemm_utilization"] > 0
    assert found["duration"] > 0


def test_what_is_no_report_makes_no_page(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "old.json").write_text('{"benchmark": "serve-load"}')
    problems = {
        "other.json": "is no output",
        "none.json": "cannot be read",
        "old.json": "lacks what this version writes: KeyError",
    }
    for source, problem in problems.items():
        with pytest.raises(InvalidRequest, match=problem):
            report.write([tmp_path / source], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_target_that_answers_nothing_ends_the_comparison_in_one_line() -> None:
    found = figures(asyncio.run(closed_loop(Counting(0.0), [Job([1], JOB.params)], 1)))
    with pytest.raises(Unavailable, match="twin answered nothing: ValueError: one token is too few"):
        compare._answered("twin", found)


def test_conversations_become_requests(engine: AsyncLLM, tmp_path: Path) -> None:
    tokenizer, path = engine._llm.tokenizer, tmp_path / "conversations.json"
    turns = [("hello", "x" * 13), ("", "empty"), ("y" * 600, "too long"), ("again", "z")]
    told = [[{"from": "human", "value": one}, {"from": "gpt", "value": other}] for one, other in turns]
    path.write_text(json.dumps([{"conversations": pair} for pair in told]))
    config = workloads_config(engine)
    found = workloads.workload(f"sharegpt:{path}", tokenizer, config, 3)
    assert [job.text for job in found] == ["hello", "again", "hello"]
    assert [job.params.max_tokens for job in found] == [16, 8, 16]
    assert found[0].prompt == tokenizer.encode("hello")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ('{"a": 1}', "is not a list"),
        ('[{"conversations": 3}]', "is not a list"),
        ('[{"conversations": []}]', "holds no conversation"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused(
    engine: AsyncLLM, tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match=problem):
        workloads.workload(f"sharegpt:{path}", engine._llm.tokenizer, workloads_config(engine), 3)
    with pytest.raises(InvalidRequest, match="needs its file"):
        workloads.workload("sharegpt", engine._llm.tokenizer, workloads_config(engine), 3)


def workloads_config(engine: AsyncLLM) -> Any:
    return engine._llm._executor.facts.config  # type: ignore[attr-defined]
