"""Grids of the study: what they ask for, once each, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remask import InvalidRequest
from remask.benchmarks.study.grid import Cell, cells, read_grid, tasks_of

STUDY = Path(__file__).parents[3] / "benchmarks" / "study"
ARMS = """
[arms]
plain = { unmask = "threshold:{t}" }
wino = { unmask = "capped_threshold:{t}", remask = "wino:0.9" }
bernoulli = { unmask = "bernoulli" }
"""
SECTION = {
    "tasks": '["addition3"]',
    "arms": '["plain"]',
    "num_prompts": "4",
    "block_lengths": '[4, "whole"]',
    "thresholds": "[0.5, 0.9]",
}


def section(**fields: str | None) -> str:
    lines = [f"{name} = {value}" for name, value in {**SECTION, **fields}.items() if value is not None]
    return "\n".join(["[[grid]]", *lines]) + "\n"


def written(path: Path, *sections: str, arms: str = ARMS) -> Path:
    file = path / "g.toml"
    file.write_text(arms + "\n".join(sections))
    return file


def cells_of(path: Path, *sections: str) -> list[Cell]:
    return cells_in(written(path, *sections))


def cells_in(file: Path) -> list[Cell]:
    grid = read_grid(file)
    return cells(grid, tasks_of(grid, file), file)


def test_a_section_is_the_product_of_its_lists(tmp_path: Path) -> None:
    found = cells_of(tmp_path, section(tasks='["addition3", "sudoku4x4"]', arms='["plain", "wino"]'))
    assert len(found) == len({cell.name for cell in found}) == 2 * 2 * 2 * 2
    one = next(c for c in found if c.name == "sudoku4x4/wino/B=4/T=0/t=0.5/seed=0")
    assert (one.unmask, one.remask) == ("capped_threshold:0.5", "wino:0.9")
    assert (one.params(3).block_length, one.params(3).max_tokens, one.params(3).seed) == (4, 20, 3)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"block_lengths": '[8, 16, "whole"]'}, 2),  # the canvas has 8 slots
        ({"ranks": '["proposal", "top"]'}, 4),  # nothing is drawn
        ({"seeds": "[0, 1]", "n": "8"}, 4),
        ({"arms": '["bernoulli"]', "seeds": "[0, 1]"}, 4),  # it draws at temperature 0, and has no threshold
        ({"temperatures": "[1.0]", "ranks": '["proposal", "top"]', "seeds": "[0, 1]"}, 16),
    ],
    ids=str,
)
def test_settings_that_mean_the_same_run_once(tmp_path: Path, fields: dict[str, str], expected: int) -> None:
    found = cells_of(tmp_path, section(**fields))
    assert len(found) == expected
    if "temperatures" not in fields and "bernoulli" not in str(fields):
        assert {cell.n for cell in found} == {1}


def test_of_equal_settings_the_most_prompts_and_samples_count(tmp_path: Path) -> None:
    drawn = {"temperatures": "[1.0]", "n": "2"}
    found = cells_of(tmp_path, section(**drawn), section(**{**drawn, "n": "1", "num_prompts": "9"}))
    assert {(cell.num_prompts, cell.n) for cell in found} == {(9, 2)}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("fields", "place", "problem"),
    [
        ({"arms": '["plian"]'}, "grid[0].arms", "did you mean 'plain'?"),
        ({"tasks": '["sudoku"]'}, "grid[0].tasks", "did you mean"),
        ({"tasks": "[]"}, "grid[0].tasks", "must not be empty"),
        ({"thresholds": "[]"}, "grid[0].thresholds", "arm 'plain' has {t}"),
        ({"thresholds": "[1.5]"}, "grid[0]: arm 'plain'", "1.5"),
        ({"block_lengths": "[0]"}, "grid[0].block_lengths", "1 or more"),
        ({"block_lengths": '["half"]'}, "$.grid[0].block_lengths", "half"),
        ({"num_prompts": "0"}, "$.grid[0].num_prompts", ">= 1"),
        ({"colour": "[1]"}, "$.grid[0]", "colour"),
        ({"ranks": '["first"]'}, "$.grid[0].ranks", "first"),
        ({"seeds": "[0, 3000000000]"}, "$.grid[0].seeds", "21474836"),
        ({"thresholds": "[0.5, 0.50000001]"}, "grid", "must differ in six digits"),
    ],
    ids=str,
)
def test_an_invalid_grid_is_refused_with_its_place(
    tmp_path: Path, fields: dict[str, str], place: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        cells_of(tmp_path, section(**fields))
    assert place in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        ('[arms]\nplain = { unmask = "threshold:{t}", remask = "winno" }\n', "winno"),
        ('[arms]\nplain = { unmask = "threshold:{t}", remask = "saber" }\n', "saber"),
        ('[arms]\nplain = { unmask = "threshold:{t}", steps = 4 }\n', "steps"),
        ("[arms\n", "is no TOML"),
        ("", "arms"),
    ],
    ids=str,
)
def test_invalid_arms_are_refused(tmp_path: Path, arms: str, problem: str) -> None:
    file = written(tmp_path, section(), arms=arms)
    with pytest.raises(InvalidRequest, match=problem):
        cells_in(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_grid(tmp_path / "none.toml")


@pytest.mark.parametrize(("name", "expected"), [("smoke", 30), ("default", 333), ("full", 1183)])
def test_the_grids_of_the_repository_are_valid(name: str, expected: int) -> None:
    path = STUDY / f"{name}.toml"
    found: list[Any] = cells_in(path)
    assert len(found) == expected
