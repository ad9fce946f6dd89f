"""`remask bench`: the measurements in `remask.benchmarks`, which is imported only when one of them runs."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

bench = typer.Typer(help="Measure throughput.", no_args_is_help=True)


@bench.callback()
def _root() -> None:
    """A callback keeps `throughput` a subcommand while it is the only one."""


@bench.command()
def throughput(
    model: Annotated[
        str, typer.Option(help="llada-124m (random weights), tiny, or a checkpoint directory.")
    ] = "llada-124m",
    workload: Annotated[str, typer.Option(help="mixed, fixed or tiny.")] = "mixed",
    num_requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated; baselines run in the first.  [default: float32, bfloat16]"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """The engine against a plain loop and a static batch over the same weights, on one CPU thread."""
    import torch

    from remask.benchmarks.throughput import as_table, measure, write_report

    torch.set_num_threads(1)
    report = measure(model, workload, num_requests, repetitions, dtype or ["float32", "bfloat16"])  # type: ignore[arg-type]
    if output is not None:
        write_report(report, output)
    if json:
        sys.stdout.write(json_module.dumps(report) + "\n")
    else:
        Console().print(as_table(report))
