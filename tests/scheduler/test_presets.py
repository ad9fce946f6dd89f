"""Presets in files: what they set, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from remask import CappedThreshold, InvalidRequest, SamplingParams, Wino
from remask.scheduler.params import resolve

TUNED = """
# tuned
unmask = "capped_threshold:0.7"
remask = "wino:0.9"
block_length = 16
temperature = 0.0
rank = "proposal"
"""


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.toml"
    path.write_text(TUNED)
    return path


def test_a_file_gives_the_fields_that_are_not_given(tuned: Path) -> None:
    own = resolve(SamplingParams.preset(str(tuned), max_tokens=40))
    assert (own.unmask, own.remask, own.block_length) == (CappedThreshold(0.7), Wino(0.9), 16)
    assert own.max_tokens == 40
    other = resolve({"preset": str(tuned), "max_tokens": 40, "remask": None, "block_length": 20})
    assert (other.remask, other.block_length) == (None, 20)


def test_its_block_length_is_cut_to_the_canvas(tuned: Path) -> None:
    assert resolve(SamplingParams.preset(str(tuned), max_tokens=10)).block_length == 10
    tuned.write_text('block_length = "whole"\n')
    assert resolve(SamplingParams.preset(str(tuned), max_tokens=200)).block_length == 200


def test_a_file_without_a_block_length_has_the_default(tuned: Path) -> None:
    tuned.write_text('unmask = "threshold:0.8"\n')
    assert resolve(SamplingParams.preset(str(tuned), max_tokens=200)).block_length == 32


def test_a_name_in_this_folder_is_a_file_if_it_ends_so(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tuned.parent)
    assert resolve(SamplingParams.preset("tuned.toml", max_tokens=40)).block_length == 16


def test_a_changed_file_is_read_again(tuned: Path) -> None:
    resolve(SamplingParams.preset(str(tuned)))
    tuned.write_text('unmask = "capped_threshold:0.5"\n')
    assert resolve(SamplingParams.preset(str(tuned))).unmask == CappedThreshold(0.5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "preset: cannot be read: No such file"),
        ("unmask = ", "preset: cannot be read: Invalid value"),
        ("max_tokens = 5", "preset: cannot be read: a preset sets neither max_tokens"),
        ('unmsk = "threshold"', "unmsk: unknown parameter; did you mean 'unmask'"),
        ('unmask = "treshold"', "unmask: unknown policy"),
        ("block_length = 0", "block_length"),
        ('block_length = "all"', "block_length"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match=problem):
        resolve(SamplingParams.preset(str(path)))
