"""`remask study`: the study in `remask.benchmarks.study`, which is imported only when it runs."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from remask.cli.options import with_flags
from remask.cli.progress import ProgressDisplay, log_to_stderr
from remask.cli.run_batch import INTERRUPTED
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

    log_to_stderr()
    torch.set_num_threads(1)  # as the workers on Ray have
    own = Study(grid, output)
    console = Console(stderr=True)
    console.print(f"{own.num_samples:,} samples in {len(own.cells):,} settings")
    try:
        with LLM(own.grid.model, **engine, **FIXED) as llm:
            with ProgressDisplay("batches") as show:
                own.time(llm, partial(show, "timing forwards"))
            console.print(f"about {own.seconds_left() / 60:.0f} minutes")
            with ProgressDisplay("samples") as show:
                own.run(llm, partial(show, "decoding"))
            with ProgressDisplay("cells") as show:
                own.verify(llm, partial(show, "exact verifier"))
        with ProgressDisplay("settings") as show:
            own.decode_posterior(partial(show, "exact posterior"))
    except KeyboardInterrupt:
        typer.echo("remask: interrupted; finished samples are saved, the same command continues", err=True)
        raise typer.Exit(INTERRUPTED) from None
    report(own.directory)


@study.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
) -> None:
    """Write the report of a run: one page, with tables and pictures inside."""
    from remask.benchmarks.study.report import write_report

    typer.echo(f"report: {write_report(directory)}")
