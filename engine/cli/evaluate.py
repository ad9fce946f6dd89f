"""`remask eval`: the Language Model Evaluation Harness with remask as its model."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import typer

from remask.scheduler.errors import InvalidRequest

COMMANDS = ("run", "ls", "validate")  # of the harness


def evaluate(context: typer.Context) -> None:
    """Run the Language Model Evaluation Harness (lm-eval) with remask as its model.

    All arguments are those of `lm-eval run`, such as --tasks and --model_args; --model is remask.
    """
    if find_spec("lm_eval") is None:
        raise InvalidRequest("eval", "lm-eval", "is not installed; run `pip install 'remask[eval]'`")
    from lm_eval.__main__ import cli_evaluate

    from remask.harness import NAME

    words = context.args
    if not words or words[0] not in COMMANDS:
        words = ["run", *words]
    is_given = any(word.partition("=")[0] in ("--model", "-M") for word in words)
    if words[0] == "run" and not is_given:
        words = [*words, "--model", NAME]
    sys.argv = ["remask eval", *words]
    cli_evaluate()
