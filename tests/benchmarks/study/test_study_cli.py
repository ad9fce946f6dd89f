"""The commands of the study, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from remask import InvalidRequest
from remask.cli import app

SMOKE = Path(__file__).parents[3] / "benchmarks" / "study" / "smoke.toml"


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["study", *map(str, words)])
    if isinstance(result.exception, InvalidRequest):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_smoke_grid_runs_and_says_where_its_report_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = invoke("run", SMOKE)
    assert status == 0
    assert "samples in 30 settings" in output
    assert output.splitlines()[-1] == "report: runs/smoke/report.html"
    before = (tmp_path / "runs/smoke/report.html").read_text()
    assert invoke("report", "runs/smoke") == (0, "report: runs/smoke/report.html\n")
    assert (tmp_path / "runs/smoke/report.html").read_text() == before


def test_nothing_starts_for_an_invalid_grid(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(SMOKE.read_text().replace('"wino", "random"', '"wino", "rando"'))
    with pytest.raises(InvalidRequest, match=r"grid\[0\].arms: is not known; did you mean 'random'"):
        invoke("run", file)


def test_a_directory_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no finished run"):
        invoke("report", tmp_path)
