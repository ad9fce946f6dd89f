"""`remask plan`: how fast a model will be on a machine, before there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remask.cli.bench import measured
from remask.scheduler.errors import InvalidRequest


def plan(
    model: Annotated[
        str, typer.Option(help="llada-8b, llada-124m, tiny, or a directory with a config.json.")
    ] = "llada-8b",
    gpu: Annotated[
        str, typer.Option(help="h200, h100, b200, a100-80gb, l40s, rtx4090, or this: measure this machine.")
    ] = "h200",
    workload: Annotated[str | None, typer.Option(help="Mean lengths of mixed or fixed.")] = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    canvas_len: Annotated[int, typer.Option(help="Tokens of a canvas.")] = 256,
    block_len: Annotated[int, typer.Option(help="Block length in slots.")] = 32,
    tokens_per_forward: Annotated[float, typer.Option(help="Commits of the policy in a forward.")] = 3.0,
    reuse: Annotated[str | None, typer.Option(help="Reused keys: prefix or both.")] = None,
    refresh: Annotated[int | None, typer.Option(help="Forwards between full ones of a block.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    check: Annotated[
        list[int] | None,
        typer.Option(help="Also time real steps with this many canvases (needs --gpu this; repeatable)."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Step time, knee, throughput, latency, and from where on an autoregressive engine is faster."""
    if dtype not in ("float32", "bfloat16"):
        raise InvalidRequest("dtype", dtype, "use float32 or bfloat16")
    if check and gpu != "this":
        raise InvalidRequest("check", check, "needs --gpu this")

    from remask.benchmarks.planner import as_table, load_of, report

    load = load_of(workload, prompt_len, canvas_len, block_len, tokens_per_forward, reuse, refresh)
    measured(lambda _: report(model, gpu, load, dtype, check or ()), as_table, output, json)
