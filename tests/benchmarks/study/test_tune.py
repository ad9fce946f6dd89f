"""`remask study tune`: goals, the search, and what it says."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from remask import LLM, InvalidRequest, SamplingParams
from remask.benchmarks.study.candidates import Candidate, block_lengths, candidates
from remask.benchmarks.study.task_files import FileTask
from remask.benchmarks.study.tune import Goal, Result, Tuned, Tuner, gains
from remask.benchmarks.study.tune_report import lines, preset, sentence
from remask.benchmarks.tiny.tasks import SUDOKU_4X4
from remask.cli import app
from remask.scheduler.params import resolve


def result(accuracy: float, forwards: float, remask: str | None = None, milliseconds: float = 1.0) -> Result:
    scores = np.zeros(100)
    scores[: round(100 * accuracy)] = 1.0
    return Result(
        Candidate("threshold", remask, None), scores, np.full(100, forwards, dtype=float), milliseconds
    )


@pytest.mark.parametrize("canvas_len", [1, 5, 8, 40, 300])
def test_every_candidate_is_valid_and_named_once(canvas_len: int) -> None:
    found = candidates(canvas_len)
    assert len(set(found)) == len(found)
    for candidate in found:
        for own in {canvas_len, max(1, canvas_len // 3)}:  # rows may have shorter canvases
            resolve(candidate.params(own))


def test_blocks_are_spread_over_the_canvas() -> None:
    assert block_lengths(8) == [None]
    assert block_lengths(40) == [8, 16, 32, None]
    assert block_lengths(512) == [8, 32, 256, None]


def test_goals_order_settings() -> None:
    found = [result(0.5, 2), result(0.8, 4), result(0.88, 6), result(0.9, 12)]
    assert Goal(max_forwards=5).order(found)[0].forwards == 4
    assert Goal(max_forwards=1).order(found)[0].forwards == 2
    assert not Goal(max_forwards=1).is_reached(found[0])
    assert Goal(min_accuracy=0.6).order(found)[0].forwards == 4
    assert Goal(min_accuracy=0.99).order(found)[0].accuracy == 0.9
    assert Goal().order(found)[0].forwards == 12
    assert Goal().order([*found, result(0.89, 7)])[0].forwards == 7


def test_gains_are_measured_at_equal_forwards_and_at_equal_time() -> None:
    plain = [result(0.6, 4, milliseconds=10.0), result(0.8, 8, milliseconds=20.0)]
    at_forwards, at_time = gains(result(0.9, 6, "wino", milliseconds=20.0), plain)
    assert (at_forwards.cost, at_time.cost) == ("nfe", "milliseconds")
    assert at_forwards.difference == pytest.approx(0.2)
    assert at_time.difference == pytest.approx(0.1)
    assert at_forwards.low < at_forwards.difference < at_forwards.high
    assert not at_time.beyond
    assert gains(result(0.9, 9, "wino", milliseconds=30.0), plain)[1].beyond


def tuned_of(*finalists: Result) -> Tuned:
    own = finalists[-1]
    plain = [entry for entry in finalists if entry.candidate.remask is None]
    return Tuned(finalists[0], True, list(finalists), own, gains(own, plain), 100, 100, 0)


def test_the_sentence_says_whether_remasking_earned_its_cost() -> None:
    plain = (result(0.6, 4, milliseconds=10.0), result(0.7, 8, milliseconds=20.0))
    better = tuned_of(*plain, result(0.95, 6, "wino", milliseconds=15.0))
    assert "it earned its cost" in sentence(better)
    slower = tuned_of(*plain, result(0.72, 4, "wino", milliseconds=20.0))
    assert "at equal forwards alone" in sentence(slower)
    worse = tuned_of(*plain, result(0.3, 6, "wino", milliseconds=15.0))
    assert "it costs accuracy" in sentence(worse)
    same = tuned_of(*plain, result(0.66, 6, "wino", milliseconds=15.0))
    assert "not shown to earn its cost" in sentence(same)
    assert lines(better._replace(is_reached=False, num_failed=3))[2:] == [
        "No setting reaches the bound; these come nearest to it.",
        "3 samples could not be judged; they count as wrong.",
    ]


def test_the_preset_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    own = Result(Candidate("capped_threshold:0.6", "wino:0.9", None), np.ones(4), np.full(4, 3.0))
    path = tmp_path / "own.toml"
    path.write_text(preset(own, "tiny", Path("rows.jsonl")))
    assert resolve(SamplingParams.preset(str(path), max_tokens=40)) == resolve(own.candidate.params(40))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """24 sudokus of 4x4 with one answer each."""
    prompts, _ = SUDOKU_4X4.sample(np.random.default_rng(11), 200, blanks=7)
    by_prompt = {prompt: SUDOKU_4X4.valid_answers(prompt) for prompt in prompts}
    unique = [(prompt, answers[0]) for prompt, answers in by_prompt.items() if len(answers) == 1][:24]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in unique))
    return path


@pytest.mark.slow
def test_the_search_reaches_its_goal_within_its_time(rows: Path, tiny_llm: LLM) -> None:
    started = time.monotonic()
    calls: list[Any] = []
    tuner = Tuner(
        tiny_llm,
        FileTask(rows, "tiny"),
        Goal(max_forwards=4),
        started + 40,
        lambda *call: calls.append(call),
    )
    tuned = tuner.run()
    assert time.monotonic() - started < 48
    assert tuned.chosen.forwards <= 4.5
    assert tuned.chosen.accuracy >= max(r.accuracy for r in tuned.finalists if r.forwards <= 4) - 0.1
    assert (tuned.num_choosing, tuned.num_reporting) == (12, 12)
    assert all(r.milliseconds > 0 for r in tuned.finalists)
    assert {r.candidate.remask is None for r in tuned.finalists} == {True, False}
    assert calls[-1][1] == calls[-1][2]


@pytest.mark.slow
def test_the_command_writes_a_preset_and_a_picture(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["study", "tune", "--model", "tiny", "--tasks", "rows.jsonl", "--minutes", "1"]
    done = CliRunner().invoke(app, [*words, "--max-num-rows", "1024", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert re.search(r"Remasking .* at equal forwards and .* at equal time", done.output)
    assert done.output.splitlines()[-1] == "preset: rows.toml"
    assert resolve(SamplingParams.preset("rows.toml", max_tokens=20)).max_tokens == 20
    with Image.open("rows.png") as image:
        assert min(image.size) >= 300


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--max-forwards", "3", "--min-accuracy", "0.5"), "two goals"),
        (("--max-forwards", "0"), "--max-forwards: must be at least 1"),
        (("--min-accuracy", "70"), "--min-accuracy: must lie between"),
        (("--minutes", "0"), "--minutes: must be above 0"),
        (("--output", "nowhere/x.toml"), "is in no directory"),
        (("--output", "rows.jsonl"), "exists already"),
        (("--checker", "exct"), "line 1: checker: is not known; did you mean 'exact'"),
        (("--max-tokens", "3"), "line 1: answer: has 16 tokens"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    rows: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], problem: str
) -> None:
    monkeypatch.chdir(rows.parent)
    asked = ["study", "tune", "--model", "tiny", "--tasks", "rows.jsonl", *words]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, InvalidRequest)
    assert re.search(problem, str(done.exception))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    done = CliRunner().invoke(app, ["study", "tune", "--model", "tiny", "--tasks", str(path)])
    assert "has 1 prompts; give at least 4" in str(done.exception)


def test_a_time_that_is_too_short_is_said(rows: Path, tiny_llm: LLM) -> None:
    task = FileTask(rows, "tiny")
    with pytest.raises(InvalidRequest, match="minutes: is too short"):
        Tuner(tiny_llm, task, Goal(), time.monotonic() - 1, lambda *_: None).run()
