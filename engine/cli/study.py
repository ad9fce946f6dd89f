"""`remask study`: the study in `remask.benchmarks.study`, which is imported only when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from remask.cli.options import with_flags
from remask.scheduler.errors import InvalidRequest

study = typer.Typer(help="Find out when remasking helps.", no_args_is_help=True)

FIXED = {"dtype": "float32", "batch_invariant": True}  # so that equal grids give equal rows
MODULES = ("pyarrow", "matplotlib")


@study.callback()
def check_installed() -> None:
    """Find out when remasking helps."""
    for module in MODULES:
        if find_spec(module) is None:
            raise InvalidRequest("study", module, "is not installed; run `pip install 'remask[study]'`")


@study.command()
@with_flags(engine_except=["model", "tokenizer", "seed", "load_format", *FIXED])
def run(
    grid: Annotated[Path, typer.Argument(help="TOML file of the grid.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run.  [default: runs/NAME-OF-THE-GRID]")
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Run a grid, or continue where it was interrupted."""
    import torch

    from remask.benchmarks.study.run import Study
    from remask.llm import LLM

    torch.set_num_threads(1)  # as the workers on Ray have
    own = Study(grid, output)
    console = Console(stderr=True)
    console.print(f"{own.num_samples:,} samples in {len(own.cells):,} settings")
    try:
        with LLM(own.grid.model, **engine, **FIXED) as llm:
            with _progress(console, "timing forwards") as progress:
                own.time(llm, progress)
            console.print(f"about {own.seconds_left() / 60:.0f} minutes")
            with _progress(console, "samples") as progress:
                own.run(llm, progress)
    except KeyboardInterrupt:
        typer.echo("remask: interrupted; finished samples are saved, the same command continues", err=True)
        raise typer.Exit(130) from None
    report(own.directory)


@study.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
) -> None:
    """Write the report of a run: one page, with tables and pictures inside."""
    from remask.benchmarks.study.report import write_report

    typer.echo(f"report: {write_report(directory)}")


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """A function that moves a bar on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
