"""`remask run-batch`: a batch file in, a file of results out, through any interruption."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.policies import PRESETS

FAILED = 3  # exit status if lines have failed
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended


def run_batch(
    input_file: Annotated[
        Path, typer.Option("-i", "--input-file", help="Requests: .jsonl, .txt or .parquet.")
    ],
    output_file: Annotated[
        Path,
        typer.Option("-o", "--output-file", help="Results: .jsonl or .parquet; must not exist."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, or start, or do nothing if done.")
    ] = False,
    invalid_lines: Annotated[
        str, typer.Option(help="refuse: a line at fault refuses the file; record: it becomes a result.")
    ] = "refuse",
    model: Annotated[str, typer.Option(help="Checkpoint directory, or 'tiny'.")] = "tiny",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What else lines may call the model; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put text prompts through the chat template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of lines that give none: canvas size in tokens.  [default: 128]")
    ] = None,
    block_length: Annotated[int | None, typer.Option(help="Likewise: slots a block.  [default: 32]")] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Likewise: published settings: {', '.join(PRESETS)}.")
    ] = None,
    unmask: Annotated[
        str | None, typer.Option(help="Likewise: unmask policy.  [default: threshold:0.9]")
    ] = None,
    remask: Annotated[str | None, typer.Option(help="Likewise: remask policy.")] = None,
    rank: Annotated[
        str | None, typer.Option(help="Likewise: confidence at a temperature.  [default: proposal]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Likewise: temperature.  [default: 0]")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Likewise: draw from the most probable tokens that hold this share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Likewise: draw from so many tokens; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Likewise: draw from tokens of this share of the largest.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Likewise: classifier-free guidance.")] = None,
    suppress_eos: Annotated[
        bool, typer.Option("--suppress-eos", help="Likewise: never propose the end of text.")
    ] = False,
    suppress_eos_confidence: Annotated[
        bool, typer.Option("--suppress-eos-confidence", help="Likewise: commit the end of text last.")
    ] = False,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Likewise: samples.  [default: 1]")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Likewise: a string that ends the text; may be repeated.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="Likewise: an id that does; may be repeated.")
    ] = None,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop-str-in-output", help="Likewise: leave in the text what ended it.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Likewise: go on after the model's own end of text.")
    ] = False,
    seed: Annotated[int, typer.Option(help="With a line's place, the seed of lines that give none.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8: products of the layers in fp8.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    attention_backend: Annotated[
        str, typer.Option(help="auto, sdpa, torch, flash2, flash3 or flash4.")
    ] = "auto",
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits in any batch; slower.")
    ] = False,
    max_num_rows: Annotated[int | None, typer.Option(help="Rows of a batch.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Canvases of a batch.")] = 1024,
) -> None:
    """Run a file of requests in OpenAI's batch format, as plain JSON lines, text or Parquet."""
    if invalid_lines not in ("refuse", "record"):
        raise InvalidRequest("--invalid-lines", invalid_lines, "must be refuse or record")
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "block_length": block_length,
        "preset": preset,
        "unmask": unmask,
        "remask": remask,
        "rank": rank,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "cfg_scale": cfg_scale,
        "suppress_eos": suppress_eos or None,
        "suppress_eos_confidence": suppress_eos_confidence or None,
        "n": n,
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "include_stop_str_in_output": include_stop_str_in_output or None,
        "ignore_eos": ignore_eos or None,
    }
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="remask: %(message)s")

    from remask.batch.run import BatchOptions
    from remask.batch.run import run_batch as run
    from remask.cli.progress import ProgressDisplay
    from remask.llm import LLM
    from remask.options import EngineOptions

    engine = EngineOptions.parse(
        model=model,
        dtype=dtype,
        quantization=quantization,
        device=device,
        attention_backend=attention_backend,
        batch_invariant=batch_invariant,
        seed=seed,
        max_num_rows=max_num_rows,
        max_num_seqs=max_num_seqs,
    )
    options = BatchOptions(
        engine=engine,
        defaults={name: value for name, value in given.items() if value is not None},
        chat=chat,
        model_names=served_model_name or (),
        resume=resume,
        record_invalid=invalid_lines == "record",
        max_live=2 * max_num_seqs,
    )

    try:
        with ProgressDisplay() as report:
            summary = run(input_file, output_file, lambda: LLM.from_options(engine), options, report)
    except KeyboardInterrupt:
        typer.echo("remask: interrupted; what is done is safe, --resume goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(_told(summary, output_file))
    if summary.num_failed:
        raise typer.Exit(FAILED)


def _told(summary: Any, output_file: Path) -> str:
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
