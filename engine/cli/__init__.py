"""The `remask` command. Every subcommand is a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import remask
from remask.cli.bench import bench
from remask.cli.evaluate import evaluate
from remask.cli.generate import generate
from remask.cli.models import models
from remask.cli.plan import plan
from remask.cli.run_batch import run_batch
from remask.cli.serve import serve
from remask.cli.study import study
from remask.cli.trace import trace
from remask.scheduler.errors import RemaskError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(generate)
app.command()(run_batch)
app.command()(serve)
app.command()(plan)
app.command()(models)
app.command()(trace)
app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(study, name="study")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"remask {remask.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve masked diffusion language models."""


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit status 2."""
    try:
        app()
    except RemaskError as error:
        print(f"remask: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
