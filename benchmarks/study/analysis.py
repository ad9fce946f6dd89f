"""Comparisons of arms with what they add to: paired on the same prompts, at equal settings and at equal cost.

The *base* of an arm has its unmask policy without its remask policy. Both are compared on the prompts that
both have answered at every threshold. At equal cost the base is read off its own curve: between
two thresholds whose mean costs enclose the arm's, each prompt's value is interpolated. An arm that costs more
than every threshold of the base is compared with the most expensive one, and `beyond` says so; one that costs
less, with the cheapest.

Intervals are percentiles of a bootstrap over prompts. Pairs of right and wrong answers are tested by
McNemar's exact test, everything else by the bootstrap. Holm's correction counts all comparisons of one kind
and measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remask.benchmarks.study.costs import Cost, Key
from remask.benchmarks.study.grid import Grid, tasks_of
from remask.benchmarks.study.measures import mean_score, pass_at, right_answers, unique_texts
from remask.benchmarks.study.tasks import StudyTask

RESAMPLES = 10_000
LEVEL = 0.95
COSTS = ("nfe", "query_rows", "milliseconds")

Values = NDArray[np.float64]  # one for each prompt


class Setting(NamedTuple):
    """What an arm and its base have in common."""

    task: str
    block_length: int | None
    temperature: float
    rank: str


class Point(NamedTuple):
    """An arm at one threshold: its costs, and the values of each measure for each prompt."""

    threshold: float | None
    costs: dict[str, float]
    values: dict[str, Values]


Sample = dict[str, Any]  # a row of the samples
ByPrompt = dict[int, list[Sample]]
Curve = dict[float | None, ByPrompt]  # by threshold
Measures = dict[str, Callable[[Sequence[Sample]], float]]  # from the samples of one prompt to a number


def comparisons(grid: Grid, samples: Iterable[Sample], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """A row for each arm with a base, setting, threshold, measure and kind of equality.

    Args:
        grid: the grid of the run.
        samples: rows of all samples.
        costs: measured costs of a forward.
    """
    curves, tasks = curves_of(samples), tasks_of(grid)
    microseconds = {cost.key: cost.microseconds for cost in costs}
    rng = np.random.default_rng(0)
    rows = []
    for (setting, name), own in curves.items():
        base = base_of(grid, name)
        curve = curves.get((setting, base)) if base is not None else None
        if base is None or curve is None:
            continue
        every = [*own.values(), *curve.values()]
        prompts = sorted(set.intersection(*(set(point) for point in every)))
        if not prompts:
            continue
        num_samples = min(len(point[prompt]) for point in every for prompt in prompts)

        def cost_of(arm: str, setting: Setting = setting) -> float:
            return microseconds[Key(setting.task, arm, setting.block_length, setting.temperature > 0)]

        measures = _measures(tasks[setting.task], num_samples)
        base_points = _points(curve, prompts, measures, cost_of(base))
        for point in _points(own, prompts, measures, cost_of(name)):
            for measure, values in point.values.items():
                common = {
                    **setting._asdict(),
                    "arm": name,
                    "base": base,
                    "threshold": point.threshold,
                    "measure": measure,
                    "num_prompts": len(values),
                    "value": float(values.mean()),
                }
                for other in base_points:
                    if other.threshold == point.threshold:
                        found = compared(values, other.values[measure], rng)
                        rows.append({**common, "equal": "threshold", "beyond": False, **found})
                for cost in COSTS if len(base_points) > 1 else ():
                    at_cost, beyond = interpolated(base_points, cost, point.costs[cost], measure)
                    found = compared(values, at_cost, rng)
                    rows.append({**common, "equal": cost, "beyond": beyond, **found})
    _correct(rows)
    return rows


def base_of(grid: Grid, name: str) -> str | None:
    """The arm with the same unmask policy and no remask policy; None: there is none, or it is the arm."""
    arm = grid.arms[name]
    if arm.remask is None:
        return None
    return next(
        (other for other, own in grid.arms.items() if own.unmask == arm.unmask and own.remask is None), None
    )


def curves_of(samples: Iterable[Sample]) -> dict[tuple[Setting, str], Curve]:
    """The samples of each arm in each setting, by threshold and prompt. Repetitions of a prompt are pooled;
    samples that have failed are left out."""
    curves: dict[tuple[Setting, str], Curve] = {}
    for sample in samples:
        if sample["error"] is None:
            setting = Setting(*(sample[name] for name in Setting._fields))
            curve = curves.setdefault((setting, sample["arm"]), {})
            curve.setdefault(sample["threshold"], {}).setdefault(sample["prompt"], []).append(sample)
    return curves


def _points(curve: Curve, prompts: Sequence[int], measures: Measures, microseconds: float) -> list[Point]:
    """The points of a curve.

    Args:
        curve: the samples of an arm.
        prompts: those that count.
        measures: by name.
        microseconds: of a forward.
    """
    points = []
    for threshold, by_prompt in curve.items():
        samples = [sample for prompt in prompts for sample in by_prompt[prompt]]
        nfe = float(np.mean([sample["nfe"] for sample in samples]))
        costs = {
            "nfe": nfe,
            "query_rows": float(np.mean([sample["num_query_rows"] for sample in samples])),
            "milliseconds": nfe * microseconds / 1000,
        }
        values = {
            name: np.array([measure(by_prompt[prompt]) for prompt in prompts], dtype=np.float64)
            for name, measure in measures.items()
        }
        points.append(Point(threshold, costs, values))
    return points


def _measures(task: StudyTask, num_samples: int) -> Measures:
    """What is compared on a task with so many samples of each prompt."""
    found: Measures = {"score": mean_score}
    if num_samples > 1:
        found["unique_texts"] = unique_texts
        if task.is_puzzle:
            found[f"pass_at_{num_samples}"] = partial(pass_at, k=num_samples)
            found["right_answers"] = right_answers
    return found


def interpolated(curve: Sequence[Point], cost: str, at: float, measure: str) -> tuple[Values, bool]:
    """The values of a base at a cost, and whether it costs more than every point of the base."""
    ordered = sorted(curve, key=lambda point: point.costs[cost])
    if at <= ordered[0].costs[cost]:
        return ordered[0].values[measure], False
    for low, high in pairwise(ordered):
        if at <= high.costs[cost]:
            share = (at - low.costs[cost]) / (high.costs[cost] - low.costs[cost])
            return (1 - share) * low.values[measure] + share * high.values[measure], False
    return ordered[-1].values[measure], True


def compared(own: Values, base: Values, rng: np.random.Generator) -> dict[str, Any]:
    """The difference of two arms on the same prompts, its interval, and a p value."""
    difference = own - base
    means = _resampled_means(difference, rng)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    is_binary = all(np.isin(values, (0.0, 1.0)).all() for values in (own, base))
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    if is_binary:
        p = mcnemar(gained, lost)
    else:
        tail = min((means <= 0).sum(), (means >= 0).sum())
        p = min(1.0, 2 * (int(tail) + 1) / (len(means) + 1))
    return {
        "base_value": float(base.mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "num_gained": gained,
        "num_lost": lost,
        "p": p,
        "test": "McNemar" if is_binary else "bootstrap",
    }


def _resampled_means(values: Values, rng: np.random.Generator) -> Values:
    chosen = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return values[chosen].mean(1)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p value of McNemar's test: of `gained` + `lost` fair coins, as uneven or more."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _correct(rows: list[dict[str, Any]]) -> None:
    """Adds `p_holm`, over all rows of one kind of equality and one measure."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["equal"], row["measure"]), []).append(row)
    for family in families.values():
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
