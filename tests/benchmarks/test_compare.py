"""The comparison with the twin, and a machine that does not stay as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remask import InvalidRequest
from remask.benchmarks import report
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.serving import compare


def test_the_comparison_measures_quality_and_speed_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "STEADY_REQUESTS", (9, 2))
    kept: list[dict[str, Any]] = []
    told: list[tuple[str, int, int]] = []
    found = compare.measure(
        policies=["threshold 0.9"],
        concurrencies=[2],
        repetitions=2,
        num_problems=12,
        progress=lambda *parts: told.append(parts),
        keep=kept.append,
    )
    assert [part[1] for part in told] == list(range(10))
    assert told[-1][2] == 9
    assert [content["repetitions"] for content in kept] == [1, 2], "an interrupted run keeps the first"
    assert list(found["quality"]) == [
        "threshold 0.9",
        "transformers generate",
        "transformers continuous batching",
    ]
    assert found["quality"]["threshold 0.9"]["solved"] > found["quality"]["transformers generate"]["solved"]
    for result in found["results"]:
        assert (result["failed"], result["completed"]) == (0, 18)
    best = max(r["times_as_fast_as_twin"]["max"] for r in found["results"] if "transformers" in r["system"])
    assert best == 1.0, "the faster of the two ways is the measure"
    (tmp_path / "compare.json").write_text(json.dumps(found))
    page = report.write([tmp_path / "compare.json"], tmp_path / "page.html")[0].read_text()
    assert found["crossovers"]["threshold 0.9"] in page


def test_the_crossover_is_where_the_twin_wins_from_there_on() -> None:
    def told(*ratios: float) -> str:
        results = [
            {"system": "a", "max_concurrency": 4**i, "times_as_fast_as_twin": {"median": ratio}}
            for i, ratio in enumerate(ratios)
        ]
        return compare.crossovers(results, {"a": {"solved": 0.9}}, ["a"])["a"]

    assert told(3.0, 0.9, 0.5).startswith("slower than the twin from between 1 and 4 requests on")
    assert told(3.0, 0.9, 1.5).startswith("not beaten by the twin at up to 16 requests")
    assert told(0.9, 0.5).startswith("slower than the twin from 1 request on (90 % solved")


def test_a_machine_that_slows_down_is_told() -> None:
    steadiness = Steadiness()
    steadiness.rates = [100e9, 96e9, 98e9]
    assert steadiness.notes() == []
    steadiness.rates.append(80e9)
    (note,) = steadiness.notes()
    assert "changed by 25 %" in note
    steadiness.look()
    assert steadiness.rates[-1] > 1e9


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"policies": ["treshold 0.9"]}, "policy"),
        ({"concurrencies": [0]}, "concurrency"),
        ({"concurrencies": [10**6]}, "concurrency"),
        ({"repetitions": 0}, "repetitions"),
        ({"num_problems": 0}, "num_problems"),
    ],
)
def test_an_impossible_comparison_is_refused_by_name(arguments: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        compare.measure(**arguments)
    assert error.value.parameter == parameter
