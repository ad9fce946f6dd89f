"""Runs of the study: equal grids give equal rows, and an interrupted run continues."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import ray
import torch

from remask import LLM, InvalidRequest
from remask.benchmarks import chaos
from remask.benchmarks.study import run as study_run
from remask.benchmarks.study.report import write_report
from remask.benchmarks.study.run import Study

GRID = """
timing_repetitions = 1

[arms]
plain = { unmask = "capped_threshold:{t}" }
wino = { unmask = "capped_threshold:{t}", remask = "wino:0.99" }

[[grid]]
tasks = ["addition3"]
arms = ["plain", "wino"]
num_prompts = 3
block_lengths = [4, "whole"]
thresholds = [0.6]

[[grid]]
tasks = ["sudoku4x4"]
arms = ["plain", "wino"]
num_prompts = 4
block_lengths = ["whole"]
thresholds = [0.3]
temperatures = [2.0]
ranks = ["top"]
n = 2
"""
NUM_SAMPLES = 4 * 3 + 2 * 4 * 2


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", dtype="float32", batch_invariant=True, max_num_rows=512) as own:
        yield own


@pytest.fixture(scope="module")
def other_llm() -> Iterator[LLM]:
    """Another burst length."""
    with LLM("tiny", dtype="float32", batch_invariant=True, max_num_rows=512, burst=2) as own:
        yield own


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remask.benchmarks.study.costs.BATCH", 2)
        patch.setattr(study_run, "MAX_PART_ROWS", 2)
        yield
    torch.set_num_threads(before)


def silent(*_: int) -> None:
    pass


def study_of(path: Path, grid: str = GRID, name: str = "runs") -> Study:
    file = path / "g.toml"
    file.write_text(grid)
    return Study(file, path / name)


def finish(own: Study, llm: LLM) -> Study:
    own.time(llm, silent)
    own.run(llm, silent)
    return own


def samples_of(own: Study) -> list[dict[str, Any]]:
    return parquet.read_table(own.samples_path).to_pylist()


@pytest.fixture(scope="module")
def whole(llm: LLM, small: None, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A run that nothing interrupted."""
    return finish(study_of(tmp_path_factory.mktemp("whole")), llm)


@pytest.fixture
def copied(whole: Study, tmp_path: Path) -> Path:
    """A directory whose `runs` holds a copy of it."""
    shutil.copytree(whole.directory, tmp_path / "runs")
    return tmp_path


def test_equal_grids_give_equal_rows_in_any_bursts_and_after_interrupts(
    whole: Study, other_llm: LLM, tmp_path: Path
) -> None:
    expected = samples_of(whole)
    assert len(expected) == whole.num_samples == NUM_SAMPLES
    assert sum(sample["num_remasks"] for sample in expected) > 0, "the grid is meant to remask"

    def interrupt(done: int, _: int) -> None:
        if done in (5, 11):
            raise KeyboardInterrupt

    cut = study_of(tmp_path, name="cut")
    cut.time(other_llm, silent)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cut.run(other_llm, interrupt)
        cut = study_of(tmp_path, name="cut")  # as another process finds it
        parts = [parquet.read_table(path) for path in (cut.directory / "parts").glob("*.parquet")]
        assert 0 < sum(map(len, parts)) < NUM_SAMPLES
    started: list[int] = []
    cut.run(other_llm, lambda done, _: started.append(done))
    assert started[0] > 5, "finished samples do not run again"
    assert started[-1] == NUM_SAMPLES
    assert samples_of(cut) == expected
    cells = [parquet.read_table(own.cells_path).drop_columns("milliseconds") for own in (whole, cut)]
    assert cells[0].to_pylist() == cells[1].to_pylist()
    assert not (cut.directory / "parts").exists()
    lines = (cut.directory / "samples.csv").read_text().splitlines()
    assert len(lines) == NUM_SAMPLES + 1


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_of_which_one_is_killed_give_the_same_rows(whole: Study, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(*_: int) -> None:
        if not killed:
            killed.append(chaos.worker_processes(ray.get_runtime_context().get_session_name())[0])
            os.kill(killed[0], signal.SIGKILL)

    own = study_of(tmp_path, name="ray")
    options: dict[str, Any] = {"distributed_executor_backend": "ray", "data_parallel_size": 2, "burst": 1}
    with LLM("tiny", dtype="float32", batch_invariant=True, max_num_rows=256, **options) as llm:
        own.time(llm, silent)
        own.run(llm, kill)
    assert killed
    assert samples_of(own) == samples_of(whole)
    cells = [parquet.read_table(run.cells_path).drop_columns("milliseconds") for run in (whole, own)]
    assert cells[0].to_pylist() == cells[1].to_pylist()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_a_part_is_written_repeats_nothing(
    whole: Study, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    own = study_of(tmp_path)
    own.time(llm, silent)
    write = study_run.write_table

    def interrupted(*arguments: Any) -> None:
        monkeypatch.setattr(study_run, "write_table", write)
        if when == "after":
            write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(study_run, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.run(llm, silent)
    assert samples_of(finish(study_of(tmp_path), llm)) == samples_of(whole)


def test_another_checkpoint_of_the_same_shape_is_another_model(tmp_path: Path) -> None:
    for name, last in (("a", b"0"), ("b", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 << 20) + last)
    assert study_run.fingerprint(str(tmp_path / "a")) != study_run.fingerprint(str(tmp_path / "b"))


def test_interrupted_timings_go_on_where_they_were(llm: LLM, tmp_path: Path) -> None:
    own = study_of(tmp_path, GRID.replace("timing_repetitions = 1", "timing_repetitions = 2"))

    def interrupt(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.time(llm, interrupt)
    before = {cost.key: cost.repetitions for cost in own.costs}
    assert [len(repetitions) for repetitions in before.values()] == [1] * 5
    started: list[int] = []
    own.time(llm, lambda done, _: started.append(done))
    assert started == list(range(5, 12))
    for cost in own.costs:
        assert cost.repetitions[:1] == before.get(cost.key, cost.repetitions[:1])
        assert len(cost.repetitions) == 2


def test_a_timed_batch_has_no_more_prompts_than_its_task(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = study_of(tmp_path, GRID.replace("num_prompts = 4", "num_prompts = 1"))
    sizes: list[int] = []
    generate = llm.generate

    def counted(prompts: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        sizes.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(llm, "generate", counted)
    own.time(llm, silent)
    assert sizes == [2, 2, 2, 2, 1, 1], "a batch has two prompts here, and the puzzles are one"
    assert [cost.canvases for cost in own.costs] == sizes


def test_a_finished_run_runs_nothing(whole: Study, llm: LLM, copied: Path) -> None:
    again = study_of(copied)
    again.time(llm, lambda *_: pytest.fail("it is timed"))
    again.run(llm, lambda *_: pytest.fail("it has run"))
    assert samples_of(again) == samples_of(whole)
    assert again.seconds_left() == 0


def test_a_directory_of_another_grid_or_model_is_refused(copied: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds a run of another grid; give another --output"):
        study_of(copied, GRID.replace("0.6", "0.7"))
    about = copied / "runs" / "study.json"
    content = json.loads(about.read_text())
    about.write_text(json.dumps({**content, "model": "0" * 16}))
    with pytest.raises(InvalidRequest, match="holds a run of another model"):
        study_of(copied)


def test_a_report_needs_no_network(copied: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no finished run"):
        write_report(study_of(copied, name="begun").directory)
    own = study_of(copied)
    page = write_report(own.directory).read_text()
    assert not re.search(r"<(script|link|iframe)|(src|href)=(?!\"data:)", page)
    assert page.count("data:image/png;base64,") == 4, "two settings, each with a curve and differences"
    for text in ("addition3, greedy", "sudoku4x4, temperature 2, rank by top", "score at equal thresholds"):
        assert text in page
    compared = parquet.read_table(own.directory / "comparisons.parquet").to_pylist()
    assert {(row["arm"], row["base"]) for row in compared} == {("wino", "plain")}
    assert sorted(path.name for path in own.directory.glob("*.png")) == [
        "addition3-T0-proposal-differences.png",
        "addition3-T0-proposal.png",
        "sudoku4x4-T2-top-differences.png",
        "sudoku4x4-T2-top.png",
    ]


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no weights"):
        study_of(tmp_path, f'model = "{tmp_path}"\n{GRID}')
