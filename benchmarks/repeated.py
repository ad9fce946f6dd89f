"""The command of a benchmark that measures ratios in interleaved repetitions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from remask.benchmarks.environment import Steadiness, environment_stamp
from remask.benchmarks.throughput import format_spread, spread, write_report

Result = dict[str, Any]


RATES = ("plain loop", "remask", "times as fast (min to max)")  # columns of `rate_cells`


def rate_figures(rates: Sequence[tuple[float, float]]) -> Result:
    """Figures of the plain loop's and the engine's samples a second in each repetition."""
    return {
        "plain_samples_per_second": spread([plain for plain, _ in rates]),
        "samples_per_second": spread([own for _, own in rates]),
        "ratio": spread([own / plain for plain, own in rates]),
    }


def rate_cells(result: Result) -> list[str]:
    """The cells of `rate_figures`."""
    return [
        f"{result['plain_samples_per_second']['median']:.1f} samples/s",
        f"{result['samples_per_second']['median']:.1f} samples/s",
        format_spread(result["ratio"]),
    ]


def run(
    description: str | None,
    header: Sequence[str],
    cells: Callable[[Result], list[str]],
    measure: Callable[[int, Steadiness], list[Result]],
    repetitions: int = 5,
) -> None:
    """Parses the command line, measures on one CPU thread, prints a table and writes a report.

    Args:
        description: of the benchmark.
        header, cells: of the table, and a line of it.
        measure: called with the number of repetitions.
        repetitions: the default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    torch.set_num_threads(1)
    environment, steadiness = environment_stamp(), Steadiness()
    report = {
        "environment": environment,
        "repetitions": args.repetitions,
        "results": measure(args.repetitions, steadiness),
        "notes": steadiness.notes(),
    }
    table = Table(*header)
    for result in report["results"]:
        table.add_row(*cells(result))
    Console().print(table, *report["notes"])
    if args.output is not None:
        write_report(report, args.output)
