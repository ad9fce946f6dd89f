"""`remask run-batch`: a batch file in, a file of results out, through any interruption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from remask.cli.options import with_flags
from remask.cli.progress import ProgressDisplay, log_to_stderr
from remask.scheduler.errors import InvalidRequest

FAILED = 3  # exit status if lines have failed
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended


@with_flags(defaults={"model": "tiny"}, sampling_except=["seed", "trace"])
def run_batch(
    input_file: Annotated[
        str,
        typer.Option(
            "-i",
            "--input-file",
            help="Requests: .jsonl, .txt or .parquet; with --executor ray-data a folder or a pattern, too.",
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output-file",
            help="Results: .jsonl or .parquet, with --executor ray-data a folder; must not exist.",
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, or start, or do nothing if done.")
    ] = False,
    invalid_lines: Annotated[
        str, typer.Option(help="refuse: an invalid line refuses the file; record: it becomes a result.")
    ] = "refuse",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What else lines may call the model; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put text prompts through the chat template.")] = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Run a file of requests in OpenAI's batch format, as plain JSON lines, text or Parquet.

    Sampling flags are the defaults of lines that do not set them; --seed, with a line's place, is the seed of
    lines without one. --executor ray-data runs the rows of many files on a pool of actors of Ray Data.
    """
    if invalid_lines not in ("refuse", "record"):
        raise InvalidRequest("--invalid-lines", invalid_lines, "must be refuse or record")
    log_to_stderr()
    if engine.get("distributed_executor_backend") == "ray-data":
        for name, value in (
            ("--resume", resume),
            ("--chat", chat),
            ("--served-model-name", served_model_name),
        ):
            if value:
                raise InvalidRequest(name, value, "is not for --executor ray-data; leave it out")
        _run_files(input_file, output_file, engine, sampling)
        return

    from remask.batch.run import BatchOptions
    from remask.batch.run import run_batch as run
    from remask.llm import LLM
    from remask.options import EngineOptions

    parsed = EngineOptions.parse(**engine)
    options = BatchOptions(
        engine=parsed,
        defaults=sampling,
        chat=chat,
        model_names=served_model_name or (),
        resume=resume,
        record_invalid=invalid_lines == "record",
        max_live=2 * parsed.max_num_seqs * parsed.data_parallel_size,
    )

    try:
        with ProgressDisplay() as report:
            summary = run(Path(input_file), output_file, lambda: LLM.from_options(parsed), options, report)
    except KeyboardInterrupt:
        typer.echo("remask: interrupted; finished lines are saved, --resume continues", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(format_summary(summary, output_file))
    if summary.num_failed:
        raise typer.Exit(FAILED)


def _run_files(source: str, output: Path, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Runs the rows of many files through Ray Data."""
    from remask.options import EngineOptions

    try:
        from remask.ray.files import run_files
    except ImportError as error:
        raise InvalidRequest(
            "--executor", error.name, "is not installed; pip install 'remask[ray]'"
        ) from None
    parsed = EngineOptions.parse(**{**engine, "distributed_executor_backend": "ray"})
    started = time.perf_counter()
    found = run_files(
        source, output, parsed, sampling, lambda count: typer.echo(f"remask: {count} files", err=True)
    )
    seconds = time.perf_counter() - started
    errors = f", {found.num_errors:,} of them refused or failed (column error)" if found.num_errors else ""
    typer.echo(f"{output}: {found.num_rows:,} results{errors}; {seconds:.1f} s")
    if found.num_errors:
        raise typer.Exit(FAILED)


def format_summary(summary: Any, output_file: Path) -> str:
    num_now = summary.num_lines - summary.num_done_before
    if not num_now:
        return f"{output_file} is finished: {summary.num_lines:,} results"
    before = f" ({summary.num_done_before:,} were done before)" if summary.num_done_before else ""
    refused = f", {summary.num_refused:,} of them refused" if summary.num_refused else ""
    rate = num_now / summary.seconds
    if summary.num_failed:
        refused += f", {summary.num_failed:,} of them failed (--resume runs these again)"
        output_file = output_file.with_name(f"{output_file.name}.partial")
    return (
        f"{output_file}: {summary.num_lines:,} results{before}{refused}; {num_now:,} lines in "
        f"{summary.seconds:.1f} s ({rate:,.1f} a second), {summary.num_tokens:,} visible tokens, "
        f"{summary.num_forwards:,} forwards"
    )
