"""What the published claims about confidence remasking come to in a run.

The claims are those of "Re-evaluating Confidence Remasking in Masked Diffusion Language Models"
(arXiv 2606.12232). They are looked for in arms of these names: `plain`, `wino` (plain with WINO), `exact`
(plain with the exact verifier), `bernoulli` and `bernoulli_wino`. A claim about arms that a run lacks is left
out.

A figure is the mean over prompts of a difference that is first averaged over the thresholds, with the
interval of a bootstrap over prompts. Differences of scores are in points (hundredths). A claim holds if the
whole interval lies in the range that it names, does not hold if none of it does, and is undecided otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from remask.benchmarks.study.analysis import (
    RESAMPLES,
    Curves,
    Point,
    Setting,
    Values,
    interpolated,
    interval,
    resampled_means,
)

SHORT = 8  # slots of a short block
PROPOSAL = "proposal"

Row = dict[str, Any]
Range = tuple[float, float]

NO_GAIN: Range = (-math.inf, 1.0)  # points: the published gain at short blocks is half of it
GAIN: Range = (math.ulp(0.0), math.inf)  # no difference is neither
LOSS: Range = (-math.inf, -math.ulp(0.0))
FLIP_FLOPS: Range = (75.0, 95.0)  # percent, as published
AGREEMENT: Range = (97.0, 100.0)  # percent, as published


class Finding(NamedTuple):
    """One figure of a claim.

    Attributes:
        claim: what was published.
        setting: where it was looked for.
        figure: what the number is, with its unit.
        value, low, high: the number and its interval.
        verdict: "holds", "does not hold" or "undecided"; empty: the figure only adds to the claim.
    """

    claim: str
    setting: str
    figure: str
    value: float
    low: float
    high: float
    verdict: str


def findings(curves: Curves, samples: Sequence[Row], agreement: Sequence[Row]) -> list[Finding]:
    """The figures of all claims that a run can judge.

    Args:
        curves: of the run.
        samples: its rows.
        agreement: rows of the comparison with the exact verifier.
    """
    settings = list(dict.fromkeys(setting for setting, _ in curves))
    greedy = [own for own in settings if own.temperature == 0]
    drawn = [own for own in settings if own.temperature > 0]
    return [
        *_short_blocks(curves, greedy),
        *_long_blocks(curves, greedy),
        *_below_short_blocks(curves, greedy),
        *_flip_flops(samples, greedy),
        *_agreement(agreement),
        *_exact_verifier(curves, greedy),
        *_pass_at_k(curves, drawn),
        *_diversity(curves, drawn),
        *_stochastic(curves, drawn),
    ]


def verdict(low: float, high: float, wanted: Range) -> str:
    """What an interval says of a claim."""
    if wanted[0] <= low and high <= wanted[1]:
        return "holds"
    return "does not hold" if high < wanted[0] or low > wanted[1] else "undecided"


def gains(
    own: Sequence[Point], base: Sequence[Point], measure: str, equal: str = "threshold"
) -> tuple[Values, int]:
    """The difference of each prompt, averaged over the thresholds of an arm at which it can be compared, and
    the number of these.

    Args:
        own, base: points of two arms on the same prompts.
        measure: what is compared.
        equal: "threshold", or the cost at which the base is interpolated; points that cost less or more than
            every point of the base are left out.
    """
    by_threshold = {point.threshold: point for point in base}
    differences = []
    for point in own:
        if measure not in point.values:
            continue
        if equal == "threshold":
            if point.threshold in by_threshold:
                differences.append(point.values[measure] - by_threshold[point.threshold].values[measure])
        elif base and min(other.costs[equal] for other in base) <= point.costs[equal]:
            at_cost, beyond = interpolated(base, equal, point.costs[equal], measure)
            if not beyond:
                differences.append(point.values[measure] - at_cost)
    return np.mean(differences, axis=0) if differences else np.zeros(0), len(differences)


def _short_blocks(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "Short blocks, greedy: remasking gains nothing"
    for setting in settings:
        if setting.block_length == SHORT:
            yield from _wino_gains(curves, claim, setting, NO_GAIN)


def _long_blocks(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "Long blocks, greedy: remasking gains"
    for setting in settings:
        if setting.block_length is None:
            yield from _wino_gains(curves, claim, setting, GAIN)


def _wino_gains(curves: Curves, claim: str, setting: Setting, wanted: Range) -> Iterator[Finding]:
    own, base = curves.paired((setting, "wino"), (setting, "plain"))
    for equal, figure in (("threshold", "WINO less plain"), ("milliseconds", "the same at equal time")):
        values, count = gains(own, base, "score", equal)
        if count < len(own):
            figure += f" ({count} of {len(own)} thresholds)"
        yield from _points(claim, setting, figure, values, wanted)


def _below_short_blocks(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "Long blocks with remasking stay below short blocks without"
    for setting in settings:
        if setting.block_length is None:
            short = setting._replace(block_length=SHORT)
            own, base = curves.paired((setting, "wino"), (short, "plain"))
            figure = f"WINO less plain in blocks of {SHORT}"
            yield from _points(claim, setting, figure, gains(own, base, "score")[0], LOSS)


def _flip_flops(samples: Sequence[Row], settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = f"{FLIP_FLOPS[0]:.0f} to {FLIP_FLOPS[1]:.0f} % of removed tokens come back"
    for setting in settings:
        own = [s for s in samples if s["arm"] == "wino" and _setting_of(s) == setting and s["error"] is None]
        counts = _by_prompt(own, "num_flip_flops", "num_refills")
        yield from _percent(claim, setting, "refills with the removed token", counts, FLIP_FLOPS)
        revised = [{**s, "gain": s["num_repairs"] - s["num_damages"]} for s in own]
        counts = _by_prompt(revised, "gain", "num_refills")
        yield from _percent(claim, setting, "refills that repair less those that damage", counts, None)


def _agreement(rows: Sequence[Row]) -> Iterator[Finding]:
    claim = f"Shadow rows and the exact verifier agree on more than {AGREEMENT[0]:.0f} % of decisions"
    for task, block_length in dict.fromkeys((row["task"], row["block_length"]) for row in rows):
        setting = Setting(task, block_length, 0.0, PROPOSAL)
        own = []
        for row in rows:
            if (row["task"], row["block_length"]) == (task, block_length):
                differ = row["num_doubted_by_shadows"] + row["num_doubted_exactly"]
                same, doubted = row["num_decisions"] - differ, row["num_doubted_by_both"] + differ
                own.append({**row, "same": same, "doubted": doubted})
        counts = _by_prompt(own, "same", "num_decisions")
        yield from _percent(claim, setting, "equal decisions", counts, AGREEMENT)
        counts = _by_prompt(own, "num_doubted_by_both", "doubted")
        yield from _percent(claim, setting, "doubts of both among those of either", counts, None)


def _exact_verifier(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "The exact verifier gains nothing over shadow rows"
    for setting in settings:
        own, base = curves.paired((setting, "exact"), (setting, "wino"))
        yield from _points(claim, setting, "exact less WINO", gains(own, base, "score")[0], NO_GAIN)
        if own and base:
            rows = [float(np.mean([point.costs["query_rows"] for point in points])) for points in (own, base)]
            times = rows[0] / rows[1]
            yield Finding(claim, _name(setting), "times the query rows", times, times, times, "")


def _pass_at_k(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "Under sampling pass@1 gains more than pass@k"
    for setting in settings:
        own, base = curves.paired((setting, "wino"), (setting, "plain"))
        measure = next((name for point in own for name in point.values if name.startswith("pass_at_")), "")
        (one, _), (many, _) = gains(own, base, "score"), gains(own, base, measure)
        if len(many):
            label = measure.replace("pass_at_", "pass@")
            yield from _points(claim, setting, "WINO less plain, pass@1", one, None)
            yield from _points(claim, setting, f"WINO less plain, {label}", many, None)
            yield from _points(claim, setting, f"gain in pass@1 less that in {label}", one - many, GAIN)


def _diversity(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "Under sampling remasking costs diversity"
    for setting in settings:
        own, base = curves.paired((setting, "wino"), (setting, "plain"))
        for measure, figure, wanted in (
            ("unique_texts", "distinct texts", LOSS),
            ("right_answers", "distinct right answers", None),
        ):
            values, _ = gains(own, base, measure)
            if len(values):
                yield _finding(claim, setting, f"{figure}, WINO less plain", values, wanted)


def _stochastic(curves: Curves, settings: Sequence[Setting]) -> Iterator[Finding]:
    claim = "With stochastic unmasking remasking gains"
    for setting in settings:
        own, base = curves.paired((setting, "bernoulli_wino"), (setting, "bernoulli"))
        figure = "Bernoulli with WINO less without"
        yield from _points(claim, setting, figure, gains(own, base, "score")[0], GAIN)
        if own and base:
            more = own[0].costs["nfe"] - base[0].costs["nfe"]
            yield Finding(claim, _name(setting), "more forwards", more, more, more, "")


def _points(
    claim: str, setting: Setting, figure: str, values: Values, wanted: Range | None
) -> Iterator[Finding]:
    if len(values):
        yield _finding(claim, setting, f"{figure}, points", 100 * values, wanted)


def _finding(claim: str, setting: Setting, figure: str, values: Values, wanted: Range | None) -> Finding:
    low, high = interval(resampled_means(values, np.random.default_rng(0)))
    own = "" if wanted is None else verdict(low, high, wanted)
    return Finding(claim, _name(setting), figure, float(values.mean()), low, high, own)


def _percent(
    claim: str, setting: Setting, figure: str, counts: Values, wanted: Range | None
) -> Iterator[Finding]:
    """A ratio of sums over prompts; nothing if the sum below is 0."""
    if counts.size == 0 or not counts[:, 1].sum():
        return
    chosen = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    sums = counts[chosen].sum(1)
    low, high = interval(100 * sums[:, 0] / np.maximum(sums[:, 1], 1))
    value = 100 * float(counts[:, 0].sum() / counts[:, 1].sum())
    own = "" if wanted is None else verdict(low, high, wanted)
    yield Finding(claim, _name(setting), f"{figure}, %", value, low, high, own)


def _by_prompt(rows: Iterable[Row], part: str, whole: str) -> Values:
    """Two sums for each prompt, [prompts, 2]."""
    sums: dict[int, list[int]] = {}
    for row in rows:
        own = sums.setdefault(row["prompt"], [0, 0])
        own[0] += row[part]
        own[1] += row[whole]
    return np.array([sums[prompt] for prompt in sorted(sums)], dtype=np.float64).reshape(-1, 2)


def _setting_of(sample: Row) -> Setting:
    return Setting(*(sample[name] for name in Setting._fields))


def _name(setting: Setting) -> str:
    block = "whole canvas" if setting.block_length is None else f"blocks of {setting.block_length}"
    drawn = f", T = {setting.temperature:g}, rank {setting.rank}" if setting.temperature > 0 else ""
    return f"{setting.task}, {block}{drawn}"
