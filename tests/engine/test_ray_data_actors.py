"""Ray Data on a cluster: actors die, and no row is lost, repeated or changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

from remask import LLM
from remask.ray import Predictor, RemaskProcessorConfig, build_processor
from remask.ray.predictor import COLUMNS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_ROWS = 160
ENGINE: dict[str, Any] = {"device": "cpu", "max_num_rows": 512, "batch_invariant": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def ask(row: dict[str, Any]) -> dict[str, Any]:
    prompt = "" if row["id"] % 50 == 7 else f"{row['id']}+{row['id'] % 7}="
    params = {"max_tokens": 24, "block_length": 8, "unmask": "schedule", "temperature": 1.0}
    return {"prompt": prompt, "sampling_params": params}


class Mortal(Predictor):
    """The engine of the first one fails when its third batch comes, while others run; its actor ends."""

    num_batches = 0

    def predict(self, batch: Any) -> Any:
        graves = Path(os.environ["GRAVES"])
        self.num_batches += 1
        if self.num_batches == 3 and not list(graves.iterdir()):
            (graves / str(os.getpid())).touch()
            self._engine._engine.step = fail  # type: ignore[method-assign]
        return super().predict(batch)


def fail() -> NoReturn:
    raise RuntimeError("a step has failed")


@pytest.mark.usefixtures("cluster")
def test_actors_that_die_change_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remask.ray.processor.Predictor", Mortal)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    processor = build_processor(
        RemaskProcessorConfig(
            model="tiny",
            engine_kwargs=ENGINE,
            batch_size=16,
            concurrency=(1, 2),
            runtime_env={"env_vars": {"GRAVES": str(tmp_path)}},
        ),
        preprocess=ask,
        postprocess=lambda row: {"answer": row["generated_text"].strip()},
    )
    rows = processor(ray.data.range(NUM_ROWS)).take_all()
    assert len(list(tmp_path.iterdir())) == 1
    assert sorted(row["id"] for row in rows) == list(range(NUM_ROWS))
    alone = Predictor("tiny", **ENGINE)
    given = [ask({"id": number}) for number in range(NUM_ROWS)]
    expected = alone.predict(
        pa.table(
            {
                "id": list(range(NUM_ROWS)),
                "prompt": [own["prompt"] for own in given],
                "sampling_params": [own["sampling_params"] for own in given],
            }
        )
    )
    alone.close()
    for row, own in zip(sorted(rows, key=lambda row: row["id"]), expected.to_pylist(), strict=True):
        assert {name: row[name] for name in COLUMNS.names} == {name: own[name] for name in COLUMNS.names}
        assert (row["error"] is None) == (row["id"] % 50 != 7)
        assert row.get("answer") == (None if row["error"] else row["generated_text"].strip())


@pytest.mark.long  # the command of the guide runs in the slow tier
@pytest.mark.usefixtures("cluster")
def test_many_files_run_through_ray_data(
    remask: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    rows = [{"id": i, "prompt": f"{i}+{i}="} for i in range(8)]
    source, output = tmp_path / "rows", tmp_path / "answers"
    source.mkdir()
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        pq.write_table(pa.Table.from_pylist(part), source / f"{name}.parquet")
    (source / "notes.txt").touch()
    flags = ("--max-tokens", "6", "--unmask", "schedule", "--device", "cpu", "--max-num-rows", "512")
    command = ("run-batch", "-i", source, "-o", output, "--executor", "ray-data", *flags)
    done = remask(*command)
    assert done.returncode == 0, done.stderr
    assert "8 results;" in done.stdout
    found = sorted(pads.dataset(output).to_table().to_pylist(), key=lambda row: row["id"])
    with LLM("tiny", device="cpu", max_num_rows=512) as llm:
        asked = {"max_tokens": 6, "unmask": "schedule"}
        expected = [own.outputs[0] for own in llm.generate([row["prompt"] for row in rows], asked)]
    assert [(row["generated_text"], row["nfe"]) for row in found] == [(o.text, o.nfe) for o in expected]
    again = remask(*command)
    assert again.returncode == 2
    assert "output_file: exists; name a new folder" in again.stderr


def test_files_that_cannot_run_are_refused_by_name(
    remask: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    def refusal(*arguments: object) -> str:
        done = remask("run-batch", "-o", tmp_path / "answers", "--executor", "ray-data", *arguments)
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    assert "input_file: holds no .parquet or .jsonl file" in refusal("-i", tmp_path)
    (tmp_path / "a.parquet").touch()
    assert "--resume: is not for --executor ray-data" in refusal("-i", tmp_path, "--resume")
    assert "unmask: " in refusal("-i", tmp_path, "--unmask", "thresold")
    (tmp_path / "b.jsonl").touch()
    assert "input_file: holds files of several formats" in refusal("-i", tmp_path)
    assert not (tmp_path / "answers").exists()
