"""Comparisons of arms with what they add to: paired on the same prompts, at equal settings and at equal cost.

The *base* of an arm has its unmask policy without its remask policy. Both are compared on the prompts that
both have answered at every threshold. At equal cost the base is read off its own curve: between
two thresholds whose mean costs enclose the arm's, each prompt's value is interpolated. An arm that costs more
than every threshold of the base is compared with the most expensive one, and `beyond` says so; one that costs
less, with the cheapest.

Intervals are percentiles of a bootstrap over prompts. At equal time, `low_if_slower` is the lower end of the
interval if the arm is slower than measured, by the scatter of the repetitions of both arms. Pairs of right
and wrong answers are tested by McNemar's exact test, everything else by a z test of the mean difference.
Holm's correction counts all comparisons of one kind and measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
TIME = "milliseconds"
COSTS = ("nfe", "query_rows", TIME)

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


class Curves:
    """The samples of a run, as curves of each arm over its thresholds.

    Args:
        grid: the grid of the run.
        samples: rows of all samples. Those that have failed are left out; repetitions of a prompt are pooled.
        costs: measured costs of a forward.
    """

    def __init__(self, grid: Grid, samples: Iterable[Sample], costs: Sequence[Cost]) -> None:
        self._tasks = tasks_of(grid)
        self._costs = {cost.key: cost for cost in costs}
        self._curves: dict[tuple[Setting, str], Curve] = {}
        for sample in samples:
            if sample["error"] is None:
                setting = Setting(*(sample[name] for name in Setting._fields))
                curve = self._curves.setdefault((setting, sample["arm"]), {})
                curve.setdefault(sample["threshold"], {}).setdefault(sample["prompt"], []).append(sample)

    def __iter__(self) -> Iterator[tuple[Setting, str]]:
        """Settings and arms."""
        return iter(self._curves)

    def paired(self, *wanted: tuple[Setting, str]) -> list[list[Point]]:
        """The points of some curves, on the prompts and samples that all of them have at every threshold. If
        there are none, the lists are empty."""
        curves = [self._curves.get(which, {}) for which in wanted]
        every = [point for curve in curves for point in curve.values()]
        if not all(curves):
            return [[] for _ in wanted]
        prompts = sorted(set.intersection(*(set(point) for point in every)))
        if not prompts:
            return [[] for _ in wanted]
        num_samples = min(len(point[prompt]) for point in every for prompt in prompts)
        measures = _measures(self._tasks[wanted[0][0].task], num_samples)
        return [
            _points(curve, prompts, num_samples, measures, self._cost(*which))
            for which, curve in zip(wanted, curves, strict=True)
        ]

    def _cost(self, setting: Setting, arm: str) -> float:
        """Microseconds of a forward."""
        return self._measured(setting, arm).microseconds

    def time_error(self, setting: Setting, *arms: str) -> float:
        """By how much the ratio of the arms' times may be wrong, as a share."""
        return math.prod(1 + self._measured(setting, arm).scatter for arm in arms) - 1

    def _measured(self, setting: Setting, arm: str) -> Cost:
        return self._costs[Key(setting.task, arm, setting.block_length, setting.temperature > 0)]


def comparisons(grid: Grid, curves: Curves) -> list[dict[str, Any]]:
    """A row for each arm with a base, setting, threshold, measure and kind of equality."""
    rng = np.random.default_rng(0)
    rows = []
    for setting, name in curves:
        base = base_of(grid, name)
        if base is None:
            continue
        own_points, base_points = curves.paired((setting, name), (setting, base))
        for point in own_points:
            for measure, values in point.values.items():
                common = {
                    **setting._asdict(),
                    "arm": name,
                    "base": base,
                    "threshold": point.threshold,
                    "measure": measure,
                    "num_prompts": len(values),
                    "low_if_slower": None,
                    "value": float(values.mean()),
                }
                for other in base_points:
                    if other.threshold == point.threshold:
                        found = compared(values, other.values[measure], rng)
                        rows.append({**common, "equal": "threshold", "beyond": False, **found})
                for cost in COSTS if len(base_points) > 1 else ():
                    at_cost, beyond = interpolated(base_points, cost, point.costs[cost], measure)
                    found = compared(values, at_cost, rng)
                    if cost == TIME:
                        slower = point.costs[cost] * (1 + curves.time_error(setting, name, base))
                        pessimistic, _ = interpolated(base_points, cost, slower, measure)
                        found["low_if_slower"] = interval(resampled_means(values - pessimistic, rng))[0]
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


def _points(
    curve: Curve, prompts: Sequence[int], num_samples: int, measures: Measures, microseconds: float
) -> list[Point]:
    """The points of a curve.

    Args:
        curve: the samples of an arm.
        prompts: those that count.
        num_samples: of each of them.
        measures: by name.
        microseconds: of a forward.
    """
    points = []
    for threshold, own in curve.items():
        by_prompt = {prompt: own[prompt][:num_samples] for prompt in prompts}
        samples = [sample for samples in by_prompt.values() for sample in samples]
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
    """The measures of a task that are compared if each prompt has `num_samples` samples."""
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
    means = resampled_means(difference, rng)
    low, high = interval(means)
    is_binary = all(np.isin(values, (0.0, 1.0)).all() for values in (own, base))
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = mcnemar(gained, lost) if is_binary else z_test(difference)
    return {
        "base_value": float(base.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "num_gained": gained,
        "num_lost": lost,
        "p": p,
        "test": "McNemar" if is_binary else "z",
    }


def resampled_means(values: Values, rng: np.random.Generator) -> Values:
    """Means of the values of prompts that are drawn with replacement."""
    chosen = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return values[chosen].mean(1)


def interval(means: Values) -> tuple[float, float]:
    """The percentiles of resampled means that hold `LEVEL` of them."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p value of McNemar's test: of `gained` + `lost` fair coins, as uneven or more."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def z_test(difference: Values) -> float:
    """The two-sided p value of the mean of some differences, from the normal distribution."""
    mean, error = difference.mean(), difference.std() / math.sqrt(len(difference))
    if error == 0:
        return float(mean == 0)
    return math.erfc(abs(mean) / error / math.sqrt(2))


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
