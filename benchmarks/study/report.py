"""The report of a run: one HTML page with its pictures inside, which needs no network, and the PNG files."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from remask import InvalidRequest
from remask.benchmarks.exactness import CHAIN, sampled_chain
from remask.benchmarks.page import STYLE, picture
from remask.benchmarks.study.analysis import COSTS, LEVEL, Curves, comparisons
from remask.benchmarks.study.claims import Finding, findings
from remask.benchmarks.study.costs import Cost
from remask.benchmarks.study.files import read_json, write_json, write_table
from remask.benchmarks.study.frontiers import frontiers, winners
from remask.benchmarks.study.grid import WHOLE, Grid

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Row = dict[str, Any]
CELL_COLUMNS = (
    "arm", "block_length", "threshold", "num_samples", "score", "nfe", "query_rows", "milliseconds",
    "tokens_per_forward", "remask_rate", "flip_flop", "useful", "non_top", "pass_at_4", "pass_at_16",
    "pass_at_64", "unique_texts", "right_answers", "right_entropy_bits", "order_diversity", "distinct_2",
    "self_bleu_diversity",
)  # fmt: skip
COMPARISON_COLUMNS = (
    "arm", "base", "block_length", "threshold", "value", "base_value", "difference", "low", "high",
    "low_if_slower", "num_gained", "num_lost", "p", "p_holm", "test", "beyond",
)  # fmt: skip
SUMMARIES = (
    ("Published claims", "claims", Finding._fields),
    (
        "Arms on the frontiers, with their thresholds",
        "frontiers",
        ("task", "temperature", "rank", "block_length", "cost", "diversity"),
    ),
    (
        "Arms with a higher score than their base at equal time",
        "winners",
        ("task", "temperature", "rank", *COMPARISON_COLUMNS),
    ),
    (
        "With the exact posterior of a Markov chain",
        "posterior",
        (
            "arm", "threshold", "block_length", "temperature", "distance", "divergence_bits", "entropy_bits",
            "nfe",
        ),
    ),
)  # fmt: skip
EQUAL = {
    "threshold": "at equal thresholds",
    "nfe": "at equal forwards",
    "query_rows": "at equal query rows",
    "milliseconds": "at equal time",
}
METHOD = (
    f"Intervals hold {100 * LEVEL:.0f} % of the means of a bootstrap over prompts. <i>p</i> is of McNemar's "
    "exact test if answers are right or wrong, else of a z test; <i>p (Holm)</i> is corrected for all "
    "comparisons of one kind and measure. At equal cost the base is interpolated between its thresholds; "
    "<i>beyond</i>: the arm costs more than every threshold of the base."
)


def write_report(directory: Path) -> Path:
    """Compares the arms of a run and writes `report.html`, the pictures and `comparisons.parquet` and `.csv`
    beside its samples; returns the page.

    Raises:
        InvalidRequest: the directory holds no finished run.
    """
    if not (directory / "cells.parquet").exists():
        problem = "holds no finished run; start or continue it with `remask study run GRID --output DIR`"
        raise InvalidRequest("directory", str(directory), problem)
    about, costs, agreement, posterior = (
        read_json(directory / f"{name}.json") for name in ("study", "costs", "agreement", "posterior")
    )
    grid, costs = msgspec.convert(about["grid"], Grid), msgspec.convert(costs, list[Cost])
    samples = (
        pyarrow.parquet.read_table(directory / "samples.parquet").drop_columns("commit_steps").to_pylist()
    )
    cells = pyarrow.parquet.read_table(directory / "cells.parquet").to_pylist()
    curves = Curves(grid, samples, costs)
    compared = comparisons(grid, curves)
    if compared:
        table = pyarrow.Table.from_pylist(compared)
        write_table(table, directory / "comparisons.parquet")
        pyarrow.csv.write_csv(table, directory / "comparisons.csv")
    summary = {
        "environment": about["environment"],
        "num_samples": sum(cell["num_samples"] for cell in cells),
        "num_failed": sum(cell["num_failed"] for cell in cells),
        "num_cells": len(cells),
        "claims": [own._asdict() for own in findings(curves, samples, agreement or [])],
        "frontiers": frontiers(cells),
        "winners": winners(compared),
        "posterior": [{"arm": CHAIN, **sampled_chain(posterior[0]["num_samples"])}, *posterior]
        if posterior
        else [],
    }
    write_json(summary, directory / "summary.json")
    page = directory / "report.html"
    page.write_text("\n".join(_page(directory, about, summary, cells, compared)), encoding="utf-8")
    return page


def _page(
    directory: Path, about: Row, summary: Row, cells: Sequence[Row], compared: Sequence[Row]
) -> Iterable[str]:
    title = f"{directory.name}: when does remasking help?"
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    yield f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    yield (
        f"<p>{summary['num_samples']:,} samples in {len(cells):,} settings of the model "
        f"{html.escape(about['grid']['model'])}; {summary['num_failed']:,} samples have failed.</p>"
    )
    yield f"<p>{METHOD}</p>"
    for heading, name, columns in SUMMARIES:
        if summary[name]:
            yield f"<h2>{heading}</h2>{_table(summary[name], columns)}"
    for (task, temperature, rank), group in groupby(sorted(cells, key=_setting), key=_setting):
        own = list(group)
        drawn = f", temperature {temperature:g}, rank by {rank}" if temperature > 0 else ", greedy"
        yield f"<h2>{html.escape(task + drawn)}</h2>"
        name = f"{task}-T{temperature:g}-{rank}"
        yield _image(_frontiers(own), directory / f"{name}.png", f"score against cost, {task}{drawn}")
        yield _table(own, CELL_COLUMNS)
        paired = [row for row in compared if _setting(row) == (task, temperature, rank)]
        if paired:
            yield _image(
                _differences(paired), directory / f"{name}-differences.png", f"differences, {task}{drawn}"
            )
        key: Callable[[Row], tuple[str, str]] = lambda row: (row["measure"], row["equal"])  # noqa: E731
        for (measure, equal), rows in groupby(sorted(paired, key=key), key=key):
            yield f"<h3>{measure} {EQUAL[equal]}</h3>"
            yield _table(list(rows), COMPARISON_COLUMNS)
    environment = ", ".join(f"{key}: {value}" for key, value in about["environment"].items())
    yield f"<p><small>{html.escape(environment)}</small></p></html>"


def _setting(row: Row) -> tuple[str, float, str]:
    return row["task"], row["temperature"], row["rank"]


def _block(length: int | None) -> str:
    return WHOLE if length is None else str(length)


def _by_block(rows: Sequence[Row]) -> list[tuple[int | None, list[Row]]]:
    """Rows by block length, the whole canvas last."""
    lengths = sorted({row["block_length"] for row in rows}, key=lambda length: length or 1 << 30)
    return [(length, [row for row in rows if row["block_length"] == length]) for length in lengths]


def _frontiers(cells: Sequence[Row]) -> Figure:
    """Score against each cost, a panel for each block length, a line for each arm over its thresholds."""
    blocks = _by_block(cells)
    figure, axes = plt.subplots(
        len(COSTS),
        len(blocks),
        figsize=(3.6 * len(blocks) + 1, 8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    for line, cost in zip(axes, COSTS, strict=True):
        for axis, (length, own) in zip(line, blocks, strict=True):
            for number, arm in enumerate(arms):
                points = sorted((c for c in own if c["arm"] == arm), key=lambda c: c["threshold"] or 0.0)
                axis.plot(
                    [c[cost] for c in points],
                    [c["score"] for c in points],
                    "o-",
                    color=f"C{number}",
                    label=arm,
                )
            axis.set_xlabel(f"{cost.replace('_', ' ')} a sample")
            axis.set_title(f"block {_block(length)}" if cost == COSTS[0] else "")
        line[0].set_ylabel("score")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _differences(compared: Sequence[Row]) -> Figure:
    """Differences of the score with their intervals, a panel for each kind of equality."""
    rows = [row for row in compared if row["measure"] == "score"]
    kinds = [kind for kind in EQUAL if any(row["equal"] == kind for row in rows)]
    count = max(sum(row["equal"] == kind for row in rows) for kind in kinds)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 1.5 + 0.17 * count), squeeze=False, layout="constrained"
    )
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row["equal"] == kind]
        own = [row for _, group in _by_block(own) for row in group]
        for place, row in enumerate(own):
            color = f"C{arms.index(row['arm'])}"
            axis.plot([100 * row["low"], 100 * row["high"]], [-place, -place], "-", color=color)
            axis.plot([100 * row["difference"]], [-place], "o", color=color, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(0, -len(own), -1))
        axis.set_yticklabels([_label(row) for row in own], fontsize=6)
        axis.set_xlabel(f"points {EQUAL[kind]}")
    return figure


def _label(row: Row) -> str:
    threshold = "" if row["threshold"] is None else f" t={row['threshold']:g}"
    return f"{row['arm']} B={_block(row['block_length'])}{threshold}"


def _image(figure: Figure, path: Path, text: str) -> str:
    """Writes a picture and returns it as HTML."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"<p>{picture(path, text)}</p>"


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as HTML; columns without a value are left out."""
    shown = [c for c in columns if c == "block_length" or any(row.get(c) is not None for row in rows)]
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in shown)
    lines = [
        "".join(f"<td>{html.escape(_cell(column, row.get(column)))}</td>" for column in shown) for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(column: str, value: Any) -> str:
    if column == "block_length":
        return _block(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.4f}"
            if column in ("p", "p_holm")
            else f"{value:.3g}"
            if abs(value) < 1000
            else f"{value:.0f}"
        )
    return str(value)
