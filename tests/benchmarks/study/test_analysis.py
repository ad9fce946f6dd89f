"""Comparisons of the study: curves, intervals, tests and their correction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from remask.benchmarks.study import analysis
from remask.benchmarks.study.analysis import Point
from remask.benchmarks.study.costs import Cost
from remask.benchmarks.study.grid import Arm, Grid

ARMS = {"plain": Arm("threshold:{t}"), "wino": Arm("threshold:{t}", "wino:0.9"), "alone": Arm(None, "saber")}
GRID = Grid(arms=ARMS, grid=())


def sample(arm: str, threshold: float, prompt: int, score: float, nfe: int, **fields: Any) -> dict[str, Any]:
    return {
        "task": "addition3", "block_length": None, "temperature": 0.0, "rank": "proposal", "arm": arm,
        "threshold": threshold, "prompt": prompt, "score": score, "nfe": nfe, "num_query_rows": 10 * nfe,
        "text": str(score), "error": None, **fields,
    }  # fmt: skip


def compared(samples: list[dict[str, Any]], own: list[Cost]) -> list[dict[str, Any]]:
    return analysis.comparisons(GRID, analysis.Curves(GRID, samples, own))


def costs(plain: float = 1000.0, wino: float = 2000.0, *, draws: bool = False) -> list[Cost]:
    return [
        Cost("addition3", arm, None, draws, 0.5, microseconds, [microseconds], 1.0)
        for arm, microseconds in (("plain", plain), ("wino", wino), ("alone", plain))
    ]


def test_an_arm_is_compared_at_its_threshold_and_at_equal_costs() -> None:
    # plain: right on prompts 0-1 of 4 at 2 forwards, on 0-2 at 4; wino: right on all at 3.
    samples = [sample("plain", 0.5, i, float(i < 2), 2) for i in range(4)]
    samples += [sample("plain", 0.9, i, float(i < 3), 4) for i in range(4)]
    samples += [sample("wino", 0.5, i, 1.0, 3) for i in range(4)]
    samples += [sample("alone", 0.5, i, 1.0, 3) for i in range(4)]
    rows = compared(samples, costs())
    assert [row["arm"] for row in rows] == ["wino"] * 4, "an arm without a base is not compared"
    by_kind = {row["equal"]: row for row in rows}
    assert by_kind["threshold"]["difference"] == 0.5
    assert (by_kind["threshold"]["num_gained"], by_kind["threshold"]["num_lost"]) == (2, 0)
    assert (by_kind["threshold"]["p"], by_kind["threshold"]["test"]) == (0.5, "McNemar")
    assert by_kind["nfe"]["base_value"] == 0.625, "halfway between two and three of four"
    assert by_kind["nfe"]["difference"] == by_kind["query_rows"]["difference"] == 0.375
    assert by_kind["nfe"]["test"] == "z"
    # 3 forwards at 2 ms are 6 ms, and plain never costs more than 4.
    assert (by_kind["milliseconds"]["base_value"], by_kind["milliseconds"]["beyond"]) == (0.75, True)
    assert by_kind["nfe"]["beyond"] is False
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


def test_a_gain_at_equal_time_is_also_told_for_the_error_of_the_times() -> None:
    samples = [sample("plain", 0.5, i, float(i < 2), 2) for i in range(4)]
    samples += [sample("plain", 0.9, i, float(i < 3), 4) for i in range(4)]
    samples += [sample("wino", 0.5, i, 1.0, 2) for i in range(4)]
    own = [
        Cost("addition3", arm, None, False, 0.5, 1000.0, times, 1.0)
        for arm, times in (("plain", [1000.0, 1000.0]), ("wino", [1000.0, 1000.0, 2000.0]), ("alone", [1.0]))
    ]
    assert [round(cost.scatter, 6) for cost in own] == [0.0, 1.0, 0.1]
    by_kind = {row["equal"]: row for row in compared(samples, own)}
    at_time = by_kind["milliseconds"]
    assert at_time["base_value"] == 0.5, "at 2 ms plain is right on two of four"
    assert at_time["low_if_slower"] == 0.0, "at 4 ms on three of four, which a bootstrap may draw alone"
    assert by_kind["nfe"]["low_if_slower"] is None


def test_samples_of_a_prompt_are_pooled_over_repetitions() -> None:
    drawn = {"temperature": 1.0}
    samples = [sample("plain", 0.5, 0, s, 2, **drawn, text=t) for s, t in ((1.0, "a"), (0.0, "b"))]
    samples += [sample("wino", 0.5, 0, 1.0, 2, **drawn, text=t) for t in "aa"]
    samples += [sample("wino", 0.5, 0, 0.0, 2, **drawn, error="failed")]
    rows = compared(samples, costs(draws=True))
    found = {row["measure"]: (row["value"], row["base_value"]) for row in rows}
    assert found == {
        "score": (1.0, 0.5), "unique_texts": (1.0, 2.0), "pass_at_2": (1.0, 1.0), "right_answers": (1.0, 1.0),
    }  # fmt: skip
    assert {row["equal"] for row in rows} == {"threshold"}, "one threshold makes no curve"


def test_a_curve_ends_at_its_ends() -> None:
    curve = [Point(None, {"nfe": nfe}, {"score": np.array([value])}) for nfe, value in ((4, 1.0), (2, 0.5))]
    for at, expected in ((1.0, (0.5, False)), (2.5, (0.625, False)), (4.0, (1.0, False)), (9.0, (1.0, True))):
        values, beyond = analysis.interpolated(curve, "nfe", at, "score")
        assert (values.tolist(), beyond) == ([expected[0]], expected[1])


@pytest.mark.parametrize(
    ("gained", "lost", "expected"), [(0, 0, 1.0), (5, 0, 1 / 16), (0, 5, 1 / 16), (3, 1, 0.625), (2, 2, 1.0)]
)
def test_mcnemar_is_an_exact_test_of_a_fair_coin(gained: int, lost: int, expected: float) -> None:
    assert analysis.mcnemar(gained, lost) == pytest.approx(expected)


def test_a_mean_is_tested_by_the_normal_distribution() -> None:
    values = np.tile([1.0, -1.0], 50) + 0.196  # 1.96 standard errors of 0.1
    assert analysis.z_test(values) == pytest.approx(0.05, abs=1e-4)
    assert analysis.z_test(np.zeros(3)) == 1.0
    assert analysis.z_test(np.ones(3)) == 0.0
    assert analysis.z_test(np.tile([1.0, 0.9], 500)) < 1e-100, "no number of comparisons hides it"


def test_holm_multiplies_the_smallest_by_most_and_never_falls() -> None:
    assert analysis.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert analysis.holm([0.9, 0.8]) == [1.0, 1.0]
    assert analysis.holm([]) == []


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        base = rng.random(60)
        found = analysis.compared(base + rng.normal(0.1, 0.3, 60), base, np.random.default_rng(0))
        hits += found["low"] <= 0.1 <= found["high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_arms_are_paired_on_the_prompts_that_all_of_them_have_answered() -> None:
    samples = [sample("plain", t, i, float(i < 3), nfe=2 + (i == 5)) for t in (0.5, 0.9) for i in range(6)]
    samples += [sample("wino", 0.5, i, float(i < 3), 2) for i in (0, 1, 3, 4)]
    samples.append(sample("plain", 0.9, 6, 1.0, 2, error="it failed"))
    rows = compared(samples, costs())
    assert {(row["num_prompts"], row["value"], row["base_value"], row["difference"]) for row in rows} == {
        (4, 0.5, 0.5, 0.0)
    }
    assert not any(row["beyond"] for row in rows if row["equal"] == "nfe"), "costs are of these prompts, too"
