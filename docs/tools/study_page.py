"""Tables of the committed run of the study, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow.parquet
from benchmark_pages import RESULTS, Table, markdown, report, source

Row = dict[str, Any]
VERDICTS = ("holds", "undecided", "does not hold")


def study_source() -> str:
    """What was run, and where."""
    found = _summary()
    failed = f"{found['num_failed']:,} samples have failed. " if found["num_failed"] else ""
    return (
        f"{found['num_samples']:,} samples in {found['num_cells']} settings. {failed}"
        f"{source('benchmarks/results/study', found['environment'])}"
    )


def study_claims() -> str:
    """A row for each figure that decides a claim: in how many settings the claim holds."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in _summary()["claims"]:
        if row["verdict"]:
            kinds.setdefault((row["claim"], _without_count(row["figure"])), []).append(row)
    lines = []
    for (claim, figure), rows in kinds.items():
        ordered = sorted(rows, key=lambda row: row["value"])
        median = ordered[(len(ordered) - 1) // 2]
        counts = [str(sum(row["verdict"] == name for row in rows)) for name in VERDICTS]
        spread = f"{ordered[0]['value']:.1f} to {ordered[-1]['value']:.1f}"
        lines.append((claim, figure, _with_interval(median), spread, *counts))
    header = ("claim", "figure", "median setting (95 % interval)", "all settings", *VERDICTS)
    return markdown(Table(header, lines))


def study_figures(claim: str) -> str:
    """The figures of one claim in each setting.

    Args:
        claim: its first words.

    Raises:
        ValueError: no claim begins like this.
    """
    rows = [row for row in _summary()["claims"] if row["claim"].startswith(claim)]
    if not rows:
        raise ValueError(f"no claim begins with {claim!r}")
    cells = [(row["setting"], row["figure"], _with_interval(row), row["verdict"]) for row in rows]
    return markdown(Table(("setting", "figure", "value (95 % interval)", "claim"), cells))


def study_frontiers() -> str:
    """The arms on the frontiers of each setting."""
    rows = _summary()["frontiers"]
    cells = [(*_setting(row), row["cost"], row["diversity"]) for row in rows]
    header = ("task", "temperature and rank", "block", "score and time", "score and distinct right answers")
    return markdown(Table(header, cells))


def study_winners() -> str:
    """The arms that beat their base at equal time."""
    if not _summary()["winners"]:
        return "None."
    cells = [
        (
            *_setting(row),
            row["arm"],
            _threshold(row),
            f"{100 * row['value']:.1f}",
            f"{100 * row['base_value']:.1f}",
            f"{100 * row['difference']:+.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})",
        )
        for row in _summary()["winners"]
    ]
    header = ("task", "temperature and rank", "block", "arm", "threshold", "score", "base", "points")
    return markdown(Table(header, cells))


def study_posterior(temperature: float) -> str:
    """The distance of each policy from the truth at one temperature, if the model makes no error."""
    rows = _summary()["posterior"]
    blocks = list(dict.fromkeys(row["block_length"] for row in rows[1:]))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [[arm, *_posterior_cells(rows, arm, temperature, blocks)] for arm in arms]
    columns = [(f"{_block(block)}: distance", "KL, bits", "entropy, bits", "NFE") for block in blocks]
    return markdown(Table(("arm", *(name for column in columns for name in column)), lines))


def study_diversity(task: str, block_length: int | None) -> str:
    """What the samples of a prompt have in common under sampling, the mean over thresholds.

    Args:
        task: its name.
        block_length: slots of a block; None: the whole canvas.
    """
    cells = pyarrow.parquet.read_table(RESULTS / "study" / "cells.parquet").to_pylist()
    settings: dict[tuple[float, str, str], list[Row]] = {}
    for cell in cells:
        if (cell["task"], cell["block_length"]) == (task, block_length) and cell["temperature"] > 0:
            settings.setdefault((cell["temperature"], cell["rank"], cell["arm"]), []).append(cell)
    order = ("plain", "wino", "random", "bernoulli", "bernoulli_wino")
    lines = []
    for (temperature, rank, arm), own in sorted(
        settings.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))
    ):

        def figure(name: str, form: str, scale: float = 1.0, own: list[Row] = own) -> str:
            values = [cell[name] for cell in own if cell.get(name) is not None]
            return format(scale * sum(values) / len(values), form) if values else ""

        lines.append(
            (
                f"{temperature:g}, {rank}",
                arm,
                figure("score", ".1f", 100),
                figure("pass_at_16", ".1f", 100),
                figure("unique_texts", ".1f"),
                figure("right_answers", ".2f"),
                figure("uniform_answers", ".2f"),
                figure("right_entropy_bits", ".2f"),
                figure("uniform_entropy_bits", ".2f"),
                figure("order_diversity", ".2f"),
                figure("non_top", ".1f", 100),
            )
        )
    header = (
        *("temperature, rank", "arm", "pass@1, %", "pass@16, %", "texts", "right answers", "if uniform"),
        *("entropy, bits", "if uniform", "orders", "not the top token, %"),
    )
    return markdown(Table(header, lines))


def _posterior_cells(
    rows: Iterable[Row], arm: str, temperature: float, blocks: Iterable[int | None]
) -> list[str]:
    cells = []
    for block in blocks:
        found = [
            row
            for row in rows
            if row["arm"] == arm
            and row.get("temperature", temperature) == temperature
            and row.get("block_length", block) == block
        ]
        for name, form in (
            ("distance", ".3f"),
            ("divergence_bits", ".3f"),
            ("entropy_bits", ".2f"),
            ("nfe", ".1f"),
        ):
            value = found[0].get(name) if found else None
            cells.append("" if value is None else format(value, form))
    return cells


def _summary() -> Row:
    return report("study/summary")


def _without_count(figure: str) -> str:
    """A figure's name without the number of thresholds that it is a mean of."""
    head, separator, _ = figure.partition(" (")
    return head + figure[figure.rindex(")") + 1 :] if separator else figure


def _with_interval(row: Row) -> str:
    if row["low"] == row["high"] == row["value"]:
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _setting(row: Row) -> tuple[str, str, str]:
    drawn = f"{row['temperature']:g}, {row['rank']}" if row["temperature"] else "greedy"
    return row["task"], drawn, _block(row["block_length"])


def _block(length: int | None) -> str:
    return "whole" if length is None else str(length)


def _threshold(row: Row) -> str:
    return "" if row["threshold"] is None else f"{row['threshold']:g}"
