"""One HTML page from the JSON files of `remask bench`, with tables and charts.

    remask bench report benchmarks/results/compare.json benchmarks/results/latency.json --output report.html

Charts are written beside the page as PNG files and are also embedded in it, so that the page can be sent
alone. The report needs matplotlib (`pip install 'remask[bench]'`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from remask import InvalidRequest
from remask.benchmarks import latency, throughput
from remask.benchmarks.page import STYLE, picture
from remask.benchmarks.serving import compare, serve_load


class Kind(NamedTuple):
    """What is done with the reports of a benchmark."""

    as_table: Callable[[dict[str, Any]], Table]
    draw: Callable[[dict[str, Any], Path], None]


def _bars(report: dict[str, Any], path: Path, name: str, label: str) -> None:
    """A bar with its least and most for each decoder."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    results = report["results"]
    ratios = [result[name] for result in results.values()]
    middle = [ratio["median"] for ratio in ratios]
    spread = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.5 * len(results)), layout="constrained")
    axes.barh(list(results), middle, xerr=spread, color="#4878a8")
    axes.invert_yaxis()
    axes.set(xlabel=label)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_ratios(report: dict[str, Any], path: Path) -> None:
    _bars(report, path, "times_as_fast", "times as fast as the baseline (median, least and most)")


def _draw_load(report: dict[str, Any], path: Path) -> None:
    """Percentiles of the latency."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = [name for name in ("median", "p90", "p99") if f"{name}_e2el_ms" in report]
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.bar(names, [report[f"{name}_e2el_ms"] for name in names], color="#4878a8")
    axes.set(ylabel="latency, ms", title=report["target"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


KINDS = {
    "throughput": Kind(throughput.as_table, _draw_ratios),
    "latency": Kind(latency.as_table, _draw_ratios),
    "serve-load": Kind(serve_load.as_table, _draw_load),
    "compare": Kind(compare.as_table, compare.draw),
}


def write(sources: Sequence[Path], output: Path) -> list[Path]:
    """Writes the page and its charts; returns all files, the page first.

    Raises:
        InvalidRequest: a file cannot be read or is no report, or matplotlib is missing; nothing was written.
    """
    reports = [read(path) for path in sources]
    try:
        import matplotlib as mpl
    except ImportError:
        raise InvalidRequest("report", None, "needs matplotlib; pip install 'remask[bench]'") from None
    del mpl
    output.parent.mkdir(parents=True, exist_ok=True)
    parts, charts = [], []
    for i, (source, report) in enumerate(zip(sources, reports, strict=True)):
        charts.append(output.with_name(f"{output.stem}-{i + 1}-{report['benchmark']}.png"))
        KINDS[report["benchmark"]].draw(report, charts[-1])
        parts.append(_section(source, report, charts[-1]))
    page = f"<!doctype html><meta charset=utf-8><title>remask bench</title><style>{STYLE}</style>"
    output.write_text("\n".join([page, "<h1>remask bench</h1>", *parts]) + "\n", encoding="utf-8")
    return [output, *charts]


def read(path: Path) -> dict[str, Any]:
    """A report.

    Raises:
        InvalidRequest: the file cannot be read, or is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest("report", str(path), f"cannot be read: {error}") from None
    if not isinstance(report, dict) or report.get("benchmark") not in KINDS:
        raise InvalidRequest("report", str(path), f"is no output of remask bench {' | '.join(KINDS)}")
    try:
        KINDS[report["benchmark"]].as_table(report)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest("report", str(path), f"lacks what this version writes: {error!r}") from None
    return report


def _section(source: Path, report: dict[str, Any], chart: Path) -> str:
    table = KINDS[report["benchmark"]].as_table(report)
    columns = [list(map(str, column.cells)) for column in table.columns]
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns, strict=True)
    )
    sentences = [f"{name}: {words}" for name, words in report.get("crossovers", {}).items()]
    sentences += report.get("notes", [])
    environment = ", ".join(
        f"{name}: {value}" for name, value in report["environment"].items() if not isinstance(value, dict)
    )
    return "\n".join(
        [
            f"<h2>{html.escape(report['benchmark'])}</h2>",
            f"<p>{html.escape(str(table.title))} ({html.escape(source.name)})</p>",
            f"<table><tr>{head}</tr>{rows}</table>",
            *(f"<p>{html.escape(words)}</p>" for words in sentences),
            picture(chart, report["benchmark"]),
            f"<p><small>{html.escape(environment)}</small></p>",
        ]
    )
