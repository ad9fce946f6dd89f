"""`remask generate`: prompts in, a table of texts, forwards and seconds out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remask.cli.options import with_flags
from remask.cli.reading import read_lines
from remask.scheduler.errors import InvalidRequest

if TYPE_CHECKING:
    from remask.outputs import RequestOutput


@with_flags(defaults={"model": "tiny"}, engine_except=["seed"], sampling_except=[])
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: read --file or stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts, one a line; '-' is stdin.")] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt through the chat template.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt instead of the table.")
    ] = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Generate text for prompts from the command line, a file or stdin."""
    texts = _read_prompts(prompts, file)

    from remask.llm import LLM

    with LLM(**engine) as llm:
        started = time.monotonic()
        if chat:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], sampling)
        else:
            outputs = llm.generate(texts, sampling)
        seconds = time.monotonic() - started
    if json:
        for output in outputs:
            sys.stdout.write(msgspec.json.encode(output).decode() + "\n")
    else:
        _print_table(outputs, seconds)


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if prompts and file is not None:
        raise InvalidRequest("--file", str(file), "and prompts on the command line exclude each other")
    if prompts:
        return prompts
    lines = read_lines(file, option="--file")
    if not lines:
        raise InvalidRequest(
            "prompts", None, "give prompts as arguments, with --file or on stdin, one a line"
        )
    return lines


def _print_table(outputs: list[RequestOutput], seconds: float) -> None:
    table = Table(show_lines=True)
    for name in ("prompt", "text"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "NFE", "tokens/forward", "seconds"):
        table.add_column(name)
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    for output, sample in samples:
        table.add_row(
            Text(output.prompt or str(output.prompt_token_ids)),
            Text(sample.text if sample.text is not None else str(sample.token_ids)),
            str(sample.num_visible_tokens),
            str(sample.nfe),
            f"{sample.tokens_per_forward:.2f}",
            f"{output.metrics.latency:.2f}",
        )
    console = Console()
    console.print(table)
    num_tokens = sum(sample.num_visible_tokens for _, sample in samples)
    num_forwards = sum(sample.nfe for _, sample in samples)
    console.print(
        f"{len(samples)} sample{'s' * (len(samples) != 1)} in {seconds:.2f} s: {num_tokens} visible tokens "
        f"({num_tokens / seconds:.0f} a second), {num_forwards} forwards"
    )
