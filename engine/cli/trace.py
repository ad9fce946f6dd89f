"""`remask trace`: what `remask generate --trace --json` wrote, replayed as the canvas fills, and drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from remask.cli.reading import read_lines
from remask.outputs import CompletionOutput, RequestOutput, Trace
from remask.scheduler.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMPTY = "░"  # a slot that holds the mask


class Frame(NamedTuple):
    """A canvas after a forward: the token in each slot (None: the mask), the confidence that it was committed
    with, and what this forward changed."""

    step: int
    tokens: list[int | None]
    confidences: list[float | None]
    committed: set[int]
    remasked: set[int]


def trace(
    file: Annotated[str, typer.Argument(help="What `generate --trace --json` wrote; '-' is stdin.")] = "-",
    request: Annotated[int, typer.Option(help="Which line of the file, from 0.")] = 0,
    sample: Annotated[int, typer.Option(help="Which of its samples, from 0.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="Checkpoint directory, or 'tiny', for the text.")] = "tiny",
    delay: Annotated[float, typer.Option(help="Seconds between two forwards on a terminal.")] = 0.2,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map, position by step, to this file.")] = None,
) -> None:
    """Replay how a canvas filled: new tokens in green, those taken back in red."""
    chosen = _read(file, request, sample)
    assert chosen.trace is not None, "checked"
    frames = list(replay(chosen.trace, chosen.nfe))
    if png is not None:
        save(heat_map(chosen.trace, frames), png)
    _show(frames, _pieces(tokenizer), delay)
    _summarise(chosen.trace, chosen.nfe)


def replay(events: Trace, num_steps: int) -> Iterator[Frame]:
    """The canvas after each forward."""
    tokens: list[int | None] = [None] * events.canvas_len
    confidences: list[float | None] = [None] * events.canvas_len
    event = 0
    for step in range(1, num_steps + 1):
        committed, remasked = set[int](), set[int]()
        while event < len(events.step) and events.step[event] == step:
            position, is_commit = events.position[event], events.is_commit[event]
            (committed if is_commit else remasked).add(position)
            tokens[position] = events.token[event] if is_commit else None
            confidences[position] = events.confidence[event] if is_commit else None
            event += 1
        yield Frame(step, list(tokens), list(confidences), committed, remasked)


def heat_map(events: Trace, frames: list[Frame]) -> Figure:
    """Position by step: the confidence that a slot's token was committed with, grey where it holds the mask,
    and crosses where a token was taken back."""
    from matplotlib.figure import Figure

    rows = [[float("nan") if c is None else c for c in frame.confidences] for frame in frames]
    figure = Figure(figsize=(max(5.0, events.canvas_len / 8 + 2), max(3.0, len(frames) / 8 + 1.5)))
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    extent = (-0.5, events.canvas_len - 0.5, len(frames) + 0.5, 0.5)
    image = axes.imshow(rows, aspect="auto", extent=extent, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="confidence at the commit")
    back = [i for i, is_commit in enumerate(events.is_commit) if not is_commit]
    if back:
        axes.scatter(
            [events.position[i] for i in back],
            [events.step[i] for i in back],
            marker="x",
            color="red",
            s=24,
            label="remasked",
        )
        axes.legend(loc="upper right")
    starts: dict[int, int] = {}
    for block, position in zip(events.block, events.position, strict=True):
        starts[block] = min(position, starts.get(block, position))
    for start in starts.values():
        axes.axvline(start - 0.5, color="white", linewidth=0.6)
    axes.set_xlabel("position")
    axes.set_ylabel("step")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG.

    Raises:
        InvalidRequest: the path cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight")
    except OSError as error:
        raise InvalidRequest("--png", str(path), f"cannot be written: {error}") from None


def _read(file: str, request: int, sample: int) -> CompletionOutput:
    lines = read_lines(Path(file), option="file")
    if not 0 <= request < len(lines):
        raise InvalidRequest("--request", request, f"the file has {len(lines)} lines; they count from 0")
    try:
        output = msgspec.json.decode(lines[request], type=RequestOutput)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        problem = f"line {request + 1} is not what `remask generate --trace --json` writes: {error}"
        raise InvalidRequest("file", file, problem) from None
    if not 0 <= sample < len(output.outputs):
        raise InvalidRequest("--sample", sample, f"there are {len(output.outputs)}; they count from 0")
    chosen = output.outputs[sample]
    if chosen.trace is None:
        raise InvalidRequest("file", file, f"line {request + 1} has no trace; generate with --trace")
    return chosen


def _pieces(tokenizer: str) -> Callable[[int], str]:
    """The text of one token."""
    from remask.embedded import model_directory
    from remask.text import load_tokenizer

    with model_directory(tokenizer) as directory:
        found = load_tokenizer(directory, required=False)
    if found is None:
        return lambda token: f" {token}"
    return lambda token: str(found.decode([token])).replace("\n", "↵\n")


def _show(frames: list[Frame], piece: Callable[[int], str], delay: float) -> None:
    console = Console()
    if not console.is_terminal:
        for frame in frames:
            console.print(_drawn(frame, piece))
        return
    with Live(console=console, auto_refresh=False) as live:
        for frame in frames:
            live.update(_drawn(frame, piece), refresh=True)
            time.sleep(delay)


def _drawn(frame: Frame, piece: Callable[[int], str]) -> Group:
    head = Text(f"step {frame.step}: +{len(frame.committed)} -{len(frame.remasked)}", style="bold")
    canvas = Text()
    for position, token in enumerate(frame.tokens):
        if position in frame.remasked:
            style = "bold red"
        elif position in frame.committed:
            style = "bold green"
        else:
            style = "dim" if token is None else ""
        canvas.append(EMPTY if token is None else piece(token), style=style)
    return Group(head, canvas)


def _summarise(events: Trace, num_steps: int) -> None:
    num_commits = sum(events.is_commit)
    removed: dict[int, int] = {}
    num_refills = num_same = 0
    for position, token, is_commit in zip(events.position, events.token, events.is_commit, strict=True):
        if not is_commit:
            removed[position] = token
        elif position in removed:
            num_refills += 1
            num_same += removed.pop(position) == token
    Console().print(
        f"{num_steps} forwards, {num_commits} commits, {len(events.step) - num_commits} remaskings; "
        f"{num_same} of {num_refills} refills are the removed token again"
    )
