"""`remask study`: the study in `remask.benchmarks.study`, which is imported only when it runs."""

from __future__ import annotations

import sys
import time
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
AllowCode = Annotated[bool, typer.Option(help="Run checkers of task files that are Python code.")]


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
    allow_code: AllowCode = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Run a grid, or continue where it was interrupted."""
    import torch

    from remask.benchmarks.study.run import Study
    from remask.llm import LLM

    log_to_stderr()
    torch.set_num_threads(1)  # as the workers on Ray have
    own = Study(grid, output, allow_code=allow_code)
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


@study.command()
@with_flags(engine_except=["model"])
def tune(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or 'tiny'.")],
    tasks: Annotated[Path, typer.Option(help="JSON lines with prompts and answers.")],
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Canvas of rows that do not say.  [default: tokens of the longest answer, and 4]"
        ),
    ] = None,
    max_forwards: Annotated[
        float | None,
        typer.Option(help="Maximum mean forwards of a sample; the best accuracy within it is sought."),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Minimum accuracy, 0 to 1; the fewest forwards that reach it are sought."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time to take, with loading.")] = 5.0,
    output: Annotated[
        Path | None, typer.Option(help="Preset file to write.  [default: NAME-OF-THE-TASKS.toml]")
    ] = None,
    checker: Annotated[str, typer.Option(help="Checker of rows that do not say.")] = "exact",
    allow_code: AllowCode = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Find the settings to use for a task, and whether remasking earns its cost there.

    Without a bound it seeks the fewest forwards at most one point below the best accuracy. The picture stands
    beside the preset file, with the suffix .png.
    """
    started = time.monotonic()
    if max_forwards is not None and min_accuracy is not None:
        raise InvalidRequest("--min-accuracy", min_accuracy, "and --max-forwards are two goals; give one")
    if max_forwards is not None and max_forwards < 1:
        raise InvalidRequest("--max-forwards", max_forwards, "must be at least 1")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise InvalidRequest("--min-accuracy", min_accuracy, "must lie between 0 and 1")
    if minutes <= 0:
        raise InvalidRequest("--minutes", minutes, "must be above 0")
    output = output or Path(f"{tasks.stem}.toml")
    if output.exists():
        raise InvalidRequest("--output", str(output), "exists already; give another name, or remove it")
    if not output.parent.is_dir():
        raise InvalidRequest("--output", str(output), "is in no directory; make it first")

    from remask.benchmarks.study import tune_report
    from remask.benchmarks.study.task_files import FileTask
    from remask.benchmarks.study.tune import MIN_ROWS, Goal, Tuner
    from remask.llm import LLM

    log_to_stderr()
    task = FileTask(tasks, model, max_tokens=max_tokens, checker=checker, allow_code=allow_code)
    task.check(MIN_ROWS)
    with LLM(model, **engine) as llm, ProgressDisplay("samples") as show:
        goal = Goal(max_forwards, min_accuracy)
        tuned = Tuner(llm, task, goal, started + 60 * minutes, show).run()
    tune_report.draw(tuned, output.with_suffix(".png"))
    output.write_text(tune_report.preset(tuned.chosen, model, tasks), encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 120).print(tune_report.table(tuned))
    for line in tune_report.lines(tuned):
        typer.echo(line)
    typer.echo(f"picture: {output.with_suffix('.png')}")
    typer.echo(f"preset: {output}")
