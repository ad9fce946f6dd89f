"""`remask generate`: prompts in, a table of texts, forwards and seconds out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remask.cli.reading import read_lines
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.policies import PRESETS

if TYPE_CHECKING:
    from remask.outputs import RequestOutput


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: read --file or stdin.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint directory, or 'tiny'.")] = "tiny",
    file: Annotated[Path | None, typer.Option(help="Prompts, one a line; '-' is stdin.")] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt through the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Canvas size in tokens.  [default: 128]")] = None,
    block_length: Annotated[int | None, typer.Option(help="Slots a block.  [default: 32]")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Published settings: {', '.join(PRESETS)}.")] = None,
    unmask: Annotated[str | None, typer.Option(help="Unmask policy.  [default: threshold:0.9]")] = None,
    remask: Annotated[str | None, typer.Option(help="Remask policy, such as wino:t2=0.9.")] = None,
    rank: Annotated[str | None, typer.Option(help="Confidence at a temperature: proposal or top.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable tokens that hold this share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of this share of the largest.")
    ] = None,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; doubles the rows.")
    ] = None,
    suppress_eos: Annotated[
        bool | None, typer.Option("--suppress-eos", help="Never propose the end of text.")
    ] = None,
    suppress_eos_confidence: Annotated[
        bool | None, typer.Option("--suppress-eos-confidence", help="Commit the end of text last.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Key of the random numbers.")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Samples of each prompt.  [default: 1]")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")
    ] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="An id that does; may be repeated.")] = None,
    include_stop_str_in_output: Annotated[
        bool | None, typer.Option("--include-stop-str-in-output", help="Leave in the text what ended it.")
    ] = None,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos", help="Go on after the model's own end of text.")
    ] = None,
    logprobs: Annotated[int | None, typer.Option(help="1: log-probabilities, in the JSON.")] = None,
    trace: Annotated[
        bool | None, typer.Option("--trace", help="Every commit and remasking, in the JSON.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits in any batch; slower.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8: products of the layers in fp8.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    attention_backend: Annotated[
        str, typer.Option(help="auto, sdpa, torch, flash2, flash3 or flash4.")
    ] = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt instead of the table.")
    ] = False,
) -> None:
    """Generate text for prompts from the command line, a file or stdin."""
    given = {
        "preset": preset,
        "max_tokens": max_tokens,
        "block_length": block_length,
        "unmask": unmask,
        "remask": remask,
        "rank": rank,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "cfg_scale": cfg_scale,
        "suppress_eos": suppress_eos,
        "suppress_eos_confidence": suppress_eos_confidence,
        "seed": seed,
        "n": n,
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "include_stop_str_in_output": include_stop_str_in_output,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
        "trace": trace,
    }
    # What is not given is left to the preset, or to the defaults of `SamplingParams`.
    fields = {name: value for name, value in given.items() if value is not None}
    texts = _read_prompts(prompts, file)

    from remask.llm import LLM

    with LLM(
        model,
        dtype=dtype,
        quantization=quantization,
        device=device,
        attention_backend=attention_backend,
        batch_invariant=batch_invariant,
    ) as llm:
        started = time.monotonic()
        if chat:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], fields)
        else:
            outputs = llm.generate(texts, fields)
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
        f"{len(samples)} samples in {seconds:.2f} s: {num_tokens} visible tokens "
        f"({num_tokens / seconds:.0f} a second), {num_forwards} forwards"
    )
