"""`remask trace`: what it replays, what it draws, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from remask import LLM, InvalidRequest, Trace
from remask.cli import app
from remask.cli.trace import heat_map, replay

TRACE = Trace(
    step=[1, 1, 2, 3, 3],
    position=[0, 2, 0, 0, 1],
    block=[0, 0, 0, 0, 0],
    token=[7, 9, 7, 7, 8],
    is_commit=[True, True, False, True, True],
    confidence=[0.5, 0.9, 0.1, 0.6, 0.8],
    is_top=[True, True, False, True, False],
    canvas_len=4,
)


@pytest.fixture(scope="module")
def traced(tiny_llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, the first without a trace."""
    import msgspec

    ask: dict[str, Any] = {"max_tokens": 12, "remask": "remdm:schedule=rescale,eta=0.5"}
    ask |= {"temperature": 1.0, "seed": 1, "ignore_eos": True}
    outputs = tiny_llm.generate(["123+456=", "111+222="], [ask, {**ask, "trace": True, "n": 2}])
    path = tmp_path_factory.mktemp("trace") / "out.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(output) for output in outputs) + b"\n")
    return path


def test_a_replay_fills_and_empties_the_slots_step_by_step() -> None:
    frames = list(replay(TRACE, 4))
    assert [frame.tokens for frame in frames] == [
        [7, None, 9, None],
        [None, None, 9, None],
        [7, 8, 9, None],
        [7, 8, 9, None],
    ]
    assert [(frame.committed, frame.remasked) for frame in frames] == [
        ({0, 2}, set()),
        (set(), {0}),
        ({0, 1}, set()),
        (set(), set()),
    ]
    assert frames[2].confidences == [0.6, 0.8, 0.9, None]


def test_the_command_shows_every_step_and_ends_with_the_text(traced: Path) -> None:
    result = CliRunner().invoke(app, ["trace", str(traced), "--request", "1", "--sample", "1"])
    assert result.exit_code == 0, result.output
    completion = json.loads(traced.read_text().splitlines()[1])["outputs"][1]
    assert [line for line in result.output.splitlines() if line.startswith("step ")][-1].startswith(
        f"step {completion['nfe']}: "
    )
    events = completion["trace"]
    num_remasks = events["is_commit"].count(False)
    assert num_remasks > 0, "the case is meant to remask"
    num_commits = events["is_commit"].count(True)
    summary = f"{completion['nfe']} forwards, {num_commits} commits, {num_remasks} remaskings"
    assert summary in " ".join(result.output.split())


def test_a_heat_map_is_a_picture_of_position_by_step(traced: Path, tmp_path: Path) -> None:
    png = tmp_path / "map.png"
    result = CliRunner().invoke(app, ["trace", str(traced), "--request", "1", "--png", str(png)])
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    axes = heat_map(TRACE, list(replay(TRACE, 4))).axes[0]
    (image,) = axes.get_images()
    assert image.get_array().shape == (4, 4)
    assert float(image.get_array()[2, 0]) == pytest.approx(0.6)
    assert image.get_array().mask[1, 0], "a mask has no confidence"
    (crosses,) = axes.collections
    assert crosses.get_offsets().tolist() == [[0, 2]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position", "step")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--request", "0"], "has no trace; generate with --trace"),
        (["--request", "2"], "--request: the file has 2 lines"),
        (["--request", "1", "--sample", "2"], "--sample: there are 2"),
        (["--request", "1", "--png", "/nowhere/map.png"], "--png: cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(traced: Path, options: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["trace", str(traced), *options])
    assert isinstance(result.exception, InvalidRequest)
    assert named in str(result.exception)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    result = CliRunner().invoke(app, ["trace", str(path)])
    assert "line 1 is not what" in str(result.exception)
    result = CliRunner().invoke(app, ["trace", str(tmp_path / "none")])
    assert "cannot be read" in str(result.exception)


def test_a_prompt_may_hold_a_line_separator(traced: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(traced.read_text().replace('"prompt":"', '"prompt":"\u2028'), encoding="utf-8")
    assert "\u2028" in path.read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["trace", str(path), "--request", "1"])
    assert result.exit_code == 0, result.exception
