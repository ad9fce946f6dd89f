"""Loads: arrivals, loops, figures, files of conversations, and reports."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remask import LLM, InvalidRequest, SamplingParams, Unavailable
from remask.benchmarks import report, workloads
from remask.benchmarks.serving import compare, serve_load
from remask.benchmarks.serving.load import Run, Served, arrival_times, closed_loop, figures, open_loop
from remask.benchmarks.serving.serve_load import LoadOptions, measure
from remask.benchmarks.serving.targets import Answer, Target
from remask.benchmarks.throughput import as_json
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
    assert arrival_times(4, 4.0, math.inf) == [0.0, 0.25, 0.5, 0.75]
    assert arrival_times(4, 4.0, 1e300) == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert arrival_times(9, 1.0, seed=1) == arrival_times(9, 1.0, seed=1) != arrival_times(9, 1.0, seed=2)


class Counting(Target):
    """Answers after `seconds`, or fails if the prompt has one token. Counts the requests in flight."""

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
    seen: list[Served] = []
    run = asyncio.run(closed_loop(target, [JOB] * 10, 3, seen.append))
    assert (target.most, target.started, run.served) == (3, 10, seen)


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


def test_a_server_that_is_not_there_is_reported_before_anything_is_loaded() -> None:
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


def test_a_report_is_strict_json(remask: Any, tmp_path: Path) -> None:
    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    run = remask(
        *("bench", "serve-load", "--num-prompts", 3, "--request-rate", 10, "--burstiness", "inf", "--json"),
        *("--output", tmp_path / "load.json"),
    )
    assert run.returncode == 0, run.stderr
    found = strict(run.stdout)
    assert found["burstiness"] is None
    assert found["duration"] >= 0.2
    assert strict((tmp_path / "load.json").read_text()) == found
    assert strict(as_json({"a": [math.nan, (1.5, {"b": -math.inf})]})) == {"a": [None, [1.5, {"b": None}]]}


def test_an_interrupted_load_keeps_what_has_come_back() -> None:
    kept: list[dict[str, Any]] = []

    async def interrupted() -> None:
        answers = 0

        def count() -> None:
            nonlocal answers
            answers += 1
            if answers == 3:
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


def test_conversations_become_requests(tiny_llm: LLM, tmp_path: Path) -> None:
    tokenizer, path = tiny_llm.tokenizer, tmp_path / "conversations.json"
    turns = [("hello", "x" * 13), ("", "empty"), ("y" * 600, "too long"), ("again", "z")]
    turn_lists = [[{"from": "human", "value": one}, {"from": "gpt", "value": other}] for one, other in turns]
    path.write_text(json.dumps([{"conversations": pair} for pair in turn_lists]))
    found = workloads.workload(f"sharegpt:{path}", tokenizer, tiny_llm.engine.intake.config, 3)
    assert [job.text for job in found] == ["hello", "again", "hello"]
    assert [job.params.max_tokens for job in found] == [16, 8, 16]
    assert found[0].prompt == tokenizer.encode("hello")  # type: ignore[union-attr]


def test_odd_rows_of_a_file_of_conversations_are_skipped_and_counted(
    tiny_llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, good = tmp_path / "conversations.json", {"value": "x"}
    odd: list[Any] = [
        None,
        "text",
        {"id": 3},
        {"conversations": None},
        {"conversations": {"a": 1}},
        {"conversations": [good]},
        {"conversations": [good, "x"]},
        {"conversations": [good, {"from": "gpt"}]},
        {"conversations": [{"value": 5}, good]},
        {"conversations": [good, {"value": "\ud800"}]},
        {"conversations": [{"value": "y" * 600}, good]},
    ]
    masked = {"conversations": [{"value": "<|mdm_mask|>"}, good, None]}
    path.write_text(json.dumps([*odd, {"conversations": [good, good]}, masked, None]), encoding="utf-8-sig")
    config = tiny_llm.engine.intake.config
    found = workloads.workload(f"sharegpt:{path}", tiny_llm.tokenizer, config, 2)
    assert [job.text for job in found] == ["x", "<|mdm_mask|>"]
    assert config.mask_id not in found[1].prompt
    assert "11 of 13 rows skipped: row 1 has no `conversations` of two turns; row 2" in caplog.text
    assert "row 6" not in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ('{"a": 1}', "is not a list"),
        ('[{"conversations": 3}]', "holds no conversation .*row 1 has no `conversations`"),
        ('[{"conversations": []}]', "holds no conversation"),
        ("[]", "holds no rows"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused(
    tiny_llm: LLM, tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    config = tiny_llm.engine.intake.config
    with pytest.raises(InvalidRequest, match=problem):
        workloads.workload(f"sharegpt:{path}", tiny_llm.tokenizer, config, 3)
    with pytest.raises(InvalidRequest, match="needs its file"):
        workloads.workload("sharegpt", tiny_llm.tokenizer, config, 3)
