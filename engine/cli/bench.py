"""`remask bench`: the measurements in `remask.benchmarks`, which is imported only when one of them runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from remask.cli.options import with_flags
from remask.scheduler.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.table import Table

    from remask.benchmarks.throughput import Keep

bench = typer.Typer(help="Measure throughput, latency, and how the twin compares.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="llada-124m (random weights), tiny, or a checkpoint directory.")]
Workload = Annotated[str, typer.Option(help="mixed, fixed, tiny, or sharegpt:FILE.json.")]
Baseline = Annotated[
    Path | None, typer.Option(help="Autoregressive checkpoint.  [default: the embedded twin]")
]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
ApiKey = Annotated[str | None, typer.Option(help="A server's key.", envvar="REMASK_API_KEY")]
Output = Annotated[Path | None, typer.Option(help="JSON file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
Options = dict[str, Any]
with_engine_flags = with_flags(engine_except=["model", "dtype", "load_format", "seed"])


@bench.command()
@with_engine_flags
def throughput(
    model: Model = "llada-124m",
    workload: Workload = "mixed",
    num_requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; baselines run in the first.  [default: float32, bfloat16; on Ray float32]"
        ),
    ] = None,
    output: Output = None,
    json: AsJson = False,
    *,
    engine: Options,
) -> None:
    """The engine against a plain loop and a static batch over the same weights, on one CPU thread."""
    from remask.benchmarks.throughput import as_table, measure

    on_ray = engine.get("distributed_executor_backend") == "ray"
    dtypes = dtype or (["float32"] if on_ray else ["float32", "bfloat16"])
    measured(
        lambda keep: measure(model, workload, num_requests, repetitions, dtypes, keep, engine),  # type: ignore[arg-type]
        as_table,
        output,
        json,
    )


@bench.command()
@with_engine_flags
def latency(
    model: Model = "tiny",
    workload: Workload = "fixed",
    batch_size: Annotated[int, typer.Option(help="Requests that come at once.")] = 1,
    num_iters: Annotated[int, typer.Option(help="Batches that count.")] = 10,
    num_iters_warmup: Annotated[int, typer.Option(help="Batches before them.")] = 2,
    dtype: Dtype = "float32",
    output: Output = None,
    json: AsJson = False,
    *,
    engine: Options,
) -> None:
    """One batch through the engine and through the published code's way of decoding, on one CPU thread."""
    from remask.benchmarks.latency import as_table, measure

    measured(
        lambda keep: measure(model, workload, batch_size, num_iters, num_iters_warmup, dtype, keep, engine),  # type: ignore[arg-type]
        as_table,
        output,
        json,
    )


@bench.command()
@with_engine_flags
def serve_load(
    target: Annotated[
        str, typer.Option(help="remask, generate or continuous (transformers), vllm, or a server's URL.")
    ] = "remask",
    model: Model = "tiny",
    baseline: Baseline = None,
    peer: Annotated[
        str | None, typer.Option(help="Another engine for the same model: dlmserve, or an adapter's path.")
    ] = None,
    peer_python: Annotated[Path | None, typer.Option(help="The Python of its environment.")] = None,
    served_model: Annotated[str | None, typer.Option(help="What a server calls its model.")] = None,
    api_key: ApiKey = None,
    workload: Workload = "tiny",
    num_prompts: Annotated[int, typer.Option(help="Requests of the workload.")] = 64,
    max_concurrency: Annotated[int | None, typer.Option(help="Maximum number of requests in flight.")] = None,
    request_rate: Annotated[float, typer.Option(help="Arrivals a second; inf: all at once.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson arrivals; less: in bursts; inf: evenly spaced.")
    ] = 1.0,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    output: Output = None,
    json: AsJson = False,
    *,
    engine: Options,
) -> None:
    """Requests in time on the engine, an autoregressive model or a server; vLLM's keys."""
    from remask.benchmarks.serving.serve_load import LoadOptions, as_table, measure

    options = LoadOptions(
        target=target,
        model=model,
        engine=engine,
        dtype=dtype,
        baseline=baseline,
        peer=peer,
        peer_python=peer_python,
        served_model=served_model,
        api_key=api_key,
        workload=workload,
        num_prompts=num_prompts,
        max_concurrency=max_concurrency,
        request_rate=request_rate,
        burstiness=burstiness,
        seed=seed,
    )
    options.check()

    def run(keep: Keep) -> dict[str, Any]:
        with _progress(num_prompts) as bar:
            return measure(options, lambda: bar.advance(bar.task_ids[0]), keep)

    report = measured(run, as_table, output, json)
    if not report["completed"]:
        sys.exit(1)


@bench.command()
@with_engine_flags
def compare(
    model: Model = "tiny",
    baseline: Baseline = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help="How that one is served: generate, continuous, vllm, or a server's URL; may be repeated.  "
            "[default: generate, continuous]"
        ),
    ] = None,
    api_key: ApiKey = None,
    workload: Annotated[
        str, typer.Option(help="tiny (answers are checked), mixed, fixed, or sharegpt:FILE.json.")
    ] = "tiny",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated.  [default: one token a step, threshold 0.9, WINO 0.7/0.9, the first two"
            " with keys reused]"
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at a time; may be repeated.  [default: 1, 4, 16, 64]")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 9,
    num_problems: Annotated[int, typer.Option(help="That quality is measured on.")] = 256,
    dtype: Dtype = "float32",
    output: Output = None,
    json: AsJson = False,
    *,
    engine: Options,
) -> None:
    """A model against an autoregressive one: quality, speed and latency over concurrencies."""
    from remask.benchmarks.serving.compare import (
        COMPARED,
        CONCURRENCIES,
        RIVALS,
        CompareOptions,
        as_table,
        measure,
    )

    options = CompareOptions(
        model=model,
        engine=engine,
        baseline=baseline,
        rivals=rival or RIVALS,
        api_key=api_key,
        dtype=dtype,
        workload=workload,
        policies=policy or COMPARED,
        concurrencies=concurrency or CONCURRENCIES,
        repetitions=repetitions,
        num_problems=num_problems,
    )
    options.check()

    def run(keep: Keep) -> dict[str, Any]:
        with _progress(None) as bar:
            task = bar.task_ids[0]
            return measure(
                options,
                lambda what, done, total: bar.update(task, completed=done, total=total, description=what),
                keep,
            )

    measured(run, as_table, output, json)


@bench.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the other commands wrote.")],
    output: Annotated[Path, typer.Option(help="HTML file to write; charts go beside it.")] = Path(
        "report.html"
    ),
) -> None:
    """One HTML page, and PNG charts, from reports."""
    from remask.benchmarks.report import write

    for path in write(files, output):
        typer.echo(str(path))


def measured(
    measure: Callable[[Keep], dict[str, Any]],
    as_table: Callable[[dict[str, Any]], Table],
    output: Path | None,
    json: bool,
) -> dict[str, Any]:
    """Measures on one thread, as all systems do that are compared. Writes the report to `output` and prints
    it, as JSON or as a table with notes.

    A measurement that ends early writes and prints the results so far, then ends as it would.

    Raises:
        InvalidRequest: the report could not be written.
    """
    import torch

    from remask.benchmarks.throughput import write_report

    torch.set_num_threads(1)
    if output is not None:
        check_output(output)
    kept: list[dict[str, Any]] = []

    def keep(report: dict[str, Any]) -> None:
        kept[:] = [report]
        if output is not None:
            write_report(report, output)

    try:
        keep(measure(keep))
    finally:
        for report in kept:
            _print(report, as_table(report), json)
    return kept[0]


def check_output(path: Path) -> None:
    """Raises InvalidRequest if a file cannot be written, before anything is measured for it."""
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if path.is_dir() or not (nearest == path or nearest.is_dir()) or not os.access(nearest, os.W_OK):
        raise InvalidRequest("output", str(path), "cannot be written; name a file in a folder of yours")


def _print(report: dict[str, Any], table: Table, json: bool) -> None:
    if json:
        from remask.benchmarks.throughput import as_json

        sys.stdout.write(as_json(report) + "\n")
        return
    Console().print(table)
    for note in (*map(": ".join, report.get("crossovers", {}).items()), *report.get("notes", ())):
        Console().print(note)


@contextmanager
def _progress(total: int | None) -> Iterator[Progress]:
    """A line on stderr with one task."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task("requests", total=total)
        yield bar
