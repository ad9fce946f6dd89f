"""Ray Data on a cluster: actors die, and no row is lost, repeated or changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pytest
import ray

from remask.ray import Predictor, RemaskProcessorConfig, build_processor
from remask.ray.predictor import COLUMNS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_ROWS = 160
ENGINE: dict[str, Any] = {"device": "cpu", "max_num_rows": 512, "batch_invariant": True}


@pytest.fixture
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
