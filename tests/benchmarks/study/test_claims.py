"""Claims and frontiers of a run, on samples whose figures are known."""

from __future__ import annotations

from typing import Any

import pytest

from remask.benchmarks.study.analysis import Curves
from remask.benchmarks.study.claims import GAIN, LOSS, Finding, findings, verdict
from remask.benchmarks.study.costs import Cost
from remask.benchmarks.study.frontiers import frontiers, winners
from remask.benchmarks.study.grid import Arm, Grid

ARMS = {
    "plain": Arm("capped_threshold:{t}"),
    "wino": Arm("capped_threshold:{t}", "wino"),
    "exact": Arm("capped_threshold:{t}", "oracle_loo"),
    "bernoulli": Arm("bernoulli"),
    "bernoulli_wino": Arm("bernoulli", "wino"),
}
GRID = Grid(arms=ARMS, grid=())
Row = dict[str, Any]


def sample(arm: str, block: int | None, prompt: int, score: float, nfe: int = 4, **fields: Any) -> Row:
    threshold = None if arm.startswith("bernoulli") else fields.pop("threshold", 0.5)
    return {
        "task": "sudoku6x6", "block_length": block, "temperature": 0.0, "rank": "proposal", "arm": arm,
        "threshold": threshold, "prompt": prompt, "score": score, "nfe": nfe, "num_query_rows": 10 * nfe,
        "text": str(score), "error": None, "num_refills": 10, "num_flip_flops": 8, "num_repairs": 2,
        "num_damages": 1, **fields,
    }  # fmt: skip


def found(samples: list[dict[str, Any]], agreement: list[dict[str, Any]] | None = None) -> list[Finding]:
    keys = {(s["arm"], s["block_length"], s["temperature"] > 0) for s in samples}
    costs = [Cost("sudoku6x6", arm, block, draws, 0.5, 1000.0, [1000.0], 4.0) for arm, block, draws in keys]
    return findings(Curves(GRID, samples, costs), samples, agreement or [])


def the(rows: list[Finding], figure: str, setting: str = "") -> Finding:
    (row,) = [row for row in rows if row.figure.startswith(figure) and setting in row.setting]
    return row


def test_gains_are_averaged_over_thresholds_and_judged_by_their_intervals() -> None:
    samples = []
    for prompt in range(20):
        for threshold, gain in ((0.5, 1.0), (0.9, 0.0)):
            for block in (8, None):
                nfe = 4 if threshold == 0.5 else 8
                own = {"threshold": threshold}
                samples.append(sample("plain", block, prompt, 0.25 if block is None else 1.0, nfe, **own))
                score = 0.25 + 0.5 * gain if block is None else 1.0
                samples.append(sample("wino", block, prompt, score, nfe, **own))
    rows = found(samples)
    short, long = (the(rows, "WINO less plain, points", name) for name in ("blocks of 8", "whole"))
    assert (short.value, short.low, short.high, short.verdict) == (0.0, 0.0, 0.0, "holds")
    assert (long.value, long.low, long.high, long.verdict) == (25.0, 25.0, 25.0, "holds")
    below = the(rows, "WINO less plain in blocks of 8", "whole")
    assert (below.value, below.verdict) == (-50.0, "holds")
    assert the(rows, "the same at equal time", "whole").value == 25.0


def test_refills_and_verifiers_are_ratios_of_sums() -> None:
    samples = [sample("wino", None, i, 1.0, num_refills=i, num_flip_flops=i // 2) for i in range(1, 5)]
    samples += [sample("exact", None, i, 0.5, nfe=8) for i in range(1, 5)]
    agreement = [
        {
            "task": "sudoku6x6", "block_length": None, "prompt": i, "num_decisions": 100,
            "num_doubted_by_both": 6, "num_doubted_by_shadows": 1, "num_doubted_exactly": 1,
        }
        for i in range(3)
    ]  # fmt: skip
    rows = found(samples, agreement)
    assert the(rows, "refills with the removed token").value == 40.0
    assert the(rows, "refills with the removed token").verdict == "does not hold"
    assert the(rows, "refills that repair").value == 40.0
    assert (the(rows, "equal decisions").value, the(rows, "equal decisions").verdict) == (98.0, "holds")
    assert the(rows, "doubts of both").value == 75.0
    assert (the(rows, "exact less WINO").value, the(rows, "exact less WINO").verdict) == (-50.0, "holds")
    assert the(rows, "times the query rows").value == 2.0


def test_pass_at_k_and_diversity_are_compared_where_tokens_are_drawn() -> None:
    drawn = {"temperature": 1.0}
    samples = []
    for prompt in range(8):
        samples += [sample("plain", None, prompt, s, **drawn, text=t) for s, t in ((1.0, "a"), (0.0, "b"))]
        samples += [sample("wino", None, prompt, 1.0, **drawn, text="a") for _ in range(2)]
        samples += [sample("bernoulli", None, prompt, 0.0, **drawn) for _ in range(2)]
        samples += [sample("bernoulli_wino", None, prompt, 1.0, nfe=6, **drawn) for _ in range(2)]
    rows = found(samples)
    assert the(rows, "WINO less plain, pass@1").value == 50.0
    assert the(rows, "WINO less plain, pass@2").value == 0.0
    assert the(rows, "gain in pass@1 less that in pass@2").verdict == "holds"
    assert (the(rows, "distinct texts").value, the(rows, "distinct texts").verdict) == (-1.0, "holds")
    assert the(rows, "distinct right answers").value == 0.0
    assert (the(rows, "Bernoulli with").value, the(rows, "Bernoulli with").verdict) == (100.0, "holds")
    assert the(rows, "more forwards").value == 2.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.0, "holds"),
        (-1.0, 0.5, "undecided"),
        (2.5, 3.5, "undecided"),
        (-2.0, -1.0, "does not hold"),
        (4.0, 5.0, "does not hold"),
    ],
)
def test_a_claim_holds_if_the_whole_interval_is_in_its_range(low: float, high: float, expected: str) -> None:
    assert verdict(low, high, (0.0, 3.0)) == expected


def test_no_difference_is_neither_a_gain_nor_a_loss() -> None:
    assert verdict(0.0, 0.0, GAIN) == verdict(0.0, 0.0, LOSS) == "does not hold"
    assert verdict(0.0, 0.3, GAIN) == verdict(-0.3, 0.0, LOSS) == "undecided"
    assert verdict(0.1, 0.3, GAIN) == verdict(-0.3, -0.1, LOSS) == "holds"


def test_at_equal_time_points_outside_the_costs_of_the_base_are_left_out() -> None:
    samples = []
    for prompt in range(4):
        for threshold, base, own in ((0.5, 4, 2), (0.7, 6, 5), (0.9, 8, 9)):
            samples.append(sample("plain", None, prompt, 0.0, base, threshold=threshold))
            samples.append(sample("wino", None, prompt, float(threshold == 0.7), own, threshold=threshold))
    row = the(found(samples), "the same at equal time (1 of 3 thresholds)")
    assert row.value == 100.0


def test_a_run_without_these_arms_judges_nothing() -> None:
    assert found([sample("plain", 8, 0, 1.0), sample("plain", None, 0, 1.0)]) == []


def cell(arm: str, threshold: float, score: float, milliseconds: float, **fields: Any) -> dict[str, Any]:
    return {
        "task": "t", "temperature": 0.0, "rank": "proposal", "block_length": None, "arm": arm,
        "threshold": threshold, "score": score, "milliseconds": milliseconds, **fields,
    }  # fmt: skip


def test_a_frontier_holds_what_nothing_dominates() -> None:
    cells = [
        cell("plain", 0.5, 0.5, 1.0), cell("plain", 0.9, 0.8, 4.0), cell("wino", 0.5, 0.7, 2.0),
        cell("wino", 0.9, 0.8, 5.0), cell("random", 0.5, 0.5, 1.5),
        cell("plain", 0.5, 0.1, 9.0, block_length=8),
    ]  # fmt: skip
    short, whole = frontiers(cells)
    assert (short["block_length"], short["cost"], short["diversity"]) == (8, "plain 0.5", "")
    assert whole["cost"] == "plain 0.5, 0.9; wino 0.5"
    drawn = [cell("plain", 0.5, 0.5, 1.0, right_answers=3.0), cell("wino", 0.5, 0.7, 2.0, right_answers=2.0)]
    assert frontiers(drawn)[0]["diversity"] == "plain 0.5; wino 0.5"


@pytest.mark.parametrize(
    ("fields", "wins"),
    [
        ({}, True),
        ({"low": 0.0}, False),
        ({"low_if_slower": -0.01}, False),
        ({"p_holm": 0.06}, False),
        ({"beyond": True}, False),
        ({"equal": "nfe"}, False),
        ({"measure": "unique_texts"}, False),
    ],
    ids=str,
)
def test_an_arm_wins_at_equal_time_after_correction(fields: dict[str, Any], wins: bool) -> None:
    row = {
        "equal": "milliseconds",
        "measure": "score",
        "low": 0.01,
        "p_holm": 0.01,
        "beyond": False,
        "low_if_slower": 0.005,
    }
    assert winners([{**row, **fields}]) == ([{**row, **fields}] if wins else [])
