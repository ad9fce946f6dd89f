"""The pages are complete, show what was measured, and build without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import benchmark_pages
import generate
import plots
import pytest
import reference
from PIL import Image
from snippets import ROOT, pages

import remask

DOCS = ROOT / "docs"


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_generated_in_a_page_is_up_to_date(path: Path) -> None:
    text = path.read_text()
    assert generate.filled(text) == text, "run python docs/tools/generate.py"
    assert "{{" not in text


def test_a_misspelt_part_of_a_page_is_an_error() -> None:
    with pytest.raises(Exception, match="benchmrk"):
        generate.filled('<!-- generate: benchmrk("throughput") -->\n<!-- end -->')


def test_every_policy_has_a_page() -> None:
    missing = [name for name in reference.own_policies() if not (DOCS / "policies" / f"{name}.md").is_file()]
    assert not missing, f"write docs/policies/NAME.md for {missing}"


def test_a_page_of_a_policy_has_its_rule_parameters_source_example_and_differences() -> None:
    sections = ("Rule", "Parameters", "Source", "Example", "Differences from the published code")
    for name in reference.own_policies():
        text = (DOCS / "policies" / f"{name}.md").read_text()
        assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(sections), name
        assert f'<!-- generate: parameters("{name}") -->' in text
        assert text.count("```python") >= 1, name


def test_every_measurement_has_a_table_and_a_page() -> None:
    measured = benchmark_pages.measured()
    assert set(benchmark_pages.TABLES) == set(measured)
    for name in measured:
        assert (
            f'<!-- generate: benchmark("{name}") -->' in (DOCS / "benchmarks" / f"{name}.md").read_text()
        ), name


@pytest.mark.parametrize("name", benchmark_pages.measured())
def test_a_measurements_table_has_a_cell_for_each_column_and_says_where_it_was_measured(name: str) -> None:
    table = benchmark_pages.TABLES[name](benchmark_pages.report(name))
    assert table.rows
    assert {len(row) for row in table.rows} == {len(table.header)}
    environment = benchmark_pages.report(name)["environment"]
    assert environment["date"] in benchmark_pages.stamp(name)
    assert f"`{environment['commit']}`" in benchmark_pages.stamp(name)


def test_every_public_name_is_in_the_reference() -> None:
    pages = ("llm", "sampling-params", "outputs", "errors", "policies")
    found = [name for page in pages for name in reference.names(page)]
    policies = [policy.__name__ for policy in reference.own_policies().values()]
    assert sorted(found + policies) == sorted(remask.__all__)
    for page in pages:
        assert f'<!-- build: autoclasses("{page}") -->' in (DOCS / "reference" / f"{page}.md").read_text()


def test_the_reference_of_commands_has_every_command_and_option() -> None:
    text = reference.cli()
    for words in ("remask generate", "remask run-batch", "remask bench throughput", "remask plan"):
        assert f"## `{words}`" in text
    for option in ("--max-tokens", "--resume", "--served-model-name", "--check", "--burstiness"):
        assert f"`{option}`" in text


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_committed_picture_shows_what_is_measured_now(name: str) -> None:
    with Image.open(plots.IMAGES / f"{name}.png") as image:
        assert image.info["Description"] == plots.digest(name), "run python docs/tools/plots.py"
        assert min(image.size) >= 300


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    for path in plots.write(tmp_path):
        with Image.open(path) as image:
            assert image.info["Description"] == plots.digest(path.stem)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for page in ("index", "policies/wino", "benchmarks/throughput", "reference/cli", "contributing"):
        assert (tmp_path / f"{page}.html").is_file()
    commands = (tmp_path / "reference" / "cli.html").read_text()
    assert "--served-model-name" in commands
