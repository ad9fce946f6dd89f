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
from remask.benchmarks.serving.compare import CompareOptions


@pytest.mark.slow
def test_the_comparison_measures_quality_and_speed_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "STEADY_REQUESTS", (9, 2))
    kept: list[dict[str, Any]] = []
    parts_seen: list[tuple[str, int, int]] = []
    options = CompareOptions(policies=["threshold 0.9"], concurrencies=[2], repetitions=2, num_problems=12)
    found = compare.measure(options, lambda *parts: parts_seen.append(parts), kept.append)
    assert [part[1] for part in parts_seen] == list(range(10))
    assert parts_seen[-1][2] == 9
    assert [content["repetitions"] for content in kept] == [1, 2], "an interrupted run keeps the first"
    assert kept[0]["notes"][0] == "Not finished: 1 of 2 repetitions."
    on_a_cpu = found["notes"][-1]
    used = [100 * r["gemm_utilization"]["median"] for r in found["results"] if "gemm_utilization" in r]
    assert f"{min(used):.0f} to {max(used):.0f} % of the matrix rate" in on_a_cpu
    assert list(found["quality"]) == [
        "threshold 0.9",
        "transformers generate",
        "transformers continuous batching",
    ]
    assert found["quality"]["threshold 0.9"]["solved"] > found["quality"]["transformers generate"]["solved"]
    for result in found["results"]:
        assert (result["failed"], result["completed"]) == (0, 18)
    best = max(r["times_as_fast"]["max"] for r in found["results"] if "transformers" in r["system"])
    assert best == 1.0, "the faster of the two ways is the measure"
    (tmp_path / "compare.json").write_text(json.dumps(found))
    page = report.write([tmp_path / "compare.json"], tmp_path / "page.html")[0].read_text()
    assert found["crossovers"]["threshold 0.9"] in page


@pytest.mark.slow
def test_models_and_workloads_without_answers_are_compared_by_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_checkpoint: Path
) -> None:
    monkeypatch.setattr(compare, "STEADY_REQUESTS", (3, 1))
    file = tmp_path / "conversations.json"
    turns = [{"from": "human", "value": "123+456="}, {"from": "gpt", "value": "0579"}]
    file.write_text(json.dumps([{"conversations": turns}]))
    options = CompareOptions(
        rivals=["generate"],
        workload=f"sharegpt:{file}",
        policies=["one token a step", "threshold 0.9", "one token a step, keys reused"],
        concurrencies=[2],
        repetitions=1,
    )
    found = compare.measure(options)
    assert set(map(str, found["quality"].values())) == {"{}"}
    assert found["crossovers"]["threshold 0.9"].endswith(("requests on", "request on", "at a time"))
    exact, bold, reusing, _ = found["results"]
    assert exact["nfe"] > bold["nfe"], "policies are those that were named"
    assert reusing["rows_per_forward"]["median"] < exact["rows_per_forward"]["median"]
    (tmp_path / "compare.json").write_text(json.dumps(found))
    page, chart = report.write([tmp_path / "compare.json"], tmp_path / "page.html")
    assert "transformers generate" in page.read_text()
    assert chart.stat().st_size > 1000
    with pytest.raises(InvalidRequest, match="holds no tokenizer"):
        compare.measure(CompareOptions(model=str(golden_checkpoint)))


def test_the_crossover_is_where_a_rival_wins_from_there_on() -> None:
    def verdict(*ratios: float) -> str:
        results = [
            {"system": system, "max_concurrency": 4**i, "times_as_fast": {"median": ratio}}
            for i, ratio in enumerate(ratios)
            for system in ("a", "rival")
        ]
        return compare.crossovers(results, {"a": {"solved": 0.9}, "rival": {"solved": 0.8}}, ["a"])["a"]

    assert verdict(3.0, 0.9, 0.5).startswith("beaten from between 1 and 4 requests on")
    assert verdict(3.0, 0.9, 1.5).startswith("not beaten at up to 16 requests at a time")
    assert verdict(0.9, 0.5) == "beaten from 1 request on (90 % solved, the rival 80 %)"


def test_a_machine_that_slows_down_is_reported() -> None:
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
        ({"rivals": ["vlm"]}, "rival"),
        ({"dtype": "float8"}, "dtype"),
        ({"model": "/nonexistent"}, "model"),
        ({"baseline": Path("/nonexistent")}, "baseline"),
        ({"workload": "mixt"}, "workload"),
    ],
)
def test_an_impossible_comparison_is_refused_by_name(arguments: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        compare.measure(CompareOptions(**arguments))
    assert error.value.parameter == parameter
