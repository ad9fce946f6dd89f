"""The `remask` command. Every subcommand is a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer

from remask.cli.bench import bench
from remask.cli.evaluate import evaluate
from remask.cli.generate import generate
from remask.cli.models import models
from remask.cli.plan import plan
from remask.cli.run_batch import run_batch
from remask.cli.study import study
from remask.cli.trace import trace
from remask.scheduler.errors import RemaskError

app = typer.Typer(
    help="Serve masked diffusion language models.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command()(generate)
app.command()(run_batch)
app.command()(plan)
app.command()(models)
app.command()(trace)
app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(study, name="study")


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit status 2."""
    try:
        app()
    except RemaskError as error:
        print(f"remask: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
