"""The pictures of the pages and of the README, from the committed measurements and the embedded model.

    python docs/tools/plots.py

writes them to `docs/images`. Each holds a digest of what it shows, by which a test knows whether it is up to
date.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from benchmark_pages import ROOT, report
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, RED, GRAY = "#31699a", "#d9822b", "#2e8b57", "#c23b3b", "#8a8a8a"
CANVAS = {
    "prompt": "25634.41.256...1.......3.4.63..32.1.=",
    "unmask": "capped_threshold:0.3",
    "remask": "wino:t2=0.9",
}


def solved() -> Figure:
    """Share of the sudokus that each policy solved, over its forwards."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    for axes, task, size in zip(panels, ("sudoku4x4", "sudoku6x6"), ("4x4", "6x6"), strict=True):
        found = [r for r in report("evaluation")["results"] if r["task"] == task]
        for result in found:
            name, nfe, score = result["policy"], result["nfe"], 100 * result["score"]
            is_twin, is_wino = name.startswith("twin"), name.startswith("WINO")
            color = GRAY if is_twin else ORANGE if is_wino else BLUE
            axes.errorbar(
                nfe, score, yerr=100 * result["standard_error"], fmt="s" if is_twin else "o", color=color
            )
            is_left = nfe > 10 or name.startswith("factor")  # where the label has room
            axes.annotate(
                name,
                (nfe, score),
                xytext=(-7 if is_left else 7, -3),
                textcoords="offset points",
                ha="right" if is_left else "left",
                fontsize=8.5,
                color=color,
            )
        axes.set(xscale="log", xlabel="model forwards a puzzle", title=f"{size} sudokus", xlim=(0.9, 60))
        axes.set_xticks([2, 5, 10, 20, 40], labels=["2", "5", "10", "20", "40"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="solved, %", ylim=(40, 104))
    return figure


def throughput() -> Figure:
    """Visible tokens a second of each decoder."""
    results = report("throughput")["results"]
    figure, axes = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
    rates = [result["visible_tokens"] / result["elapsed_time"] for result in results.values()]
    colors = [BLUE if name.startswith("engine") else GRAY for name in results]
    bars = axes.barh(list(results), rates, color=colors)
    axes.bar_label(bars, labels=[f"{rate:.1f}" for rate in rates], padding=4)
    axes.invert_yaxis()
    axes.set(xlabel="visible tokens a second, one CPU thread", xlim=(0, 1.12 * max(rates)))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def study() -> Figure:
    """What WINO adds to a capped threshold: greedy by block length, and with drawn tokens in pass@k."""
    rows = report("study/summary")["claims"]
    figure, (greedy, drawn) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    gains = [row for row in rows if "blocks, greedy" in row["claim"]]
    at_time = "the same at equal time"
    _intervals(
        greedy,
        list(dict.fromkeys(row["setting"] for row in gains)),
        {
            "at equal thresholds": (BLUE, [row for row in gains if row["figure"].startswith("WINO")]),
            "at equal time": (ORANGE, [row for row in gains if row["figure"].startswith(at_time)]),
        },
    )
    greedy.set(title="greedy", xlabel="points that WINO adds")
    passes = [row for row in rows if row["figure"].startswith("WINO less plain, pass@")]
    _intervals(
        drawn,
        list(dict.fromkeys(row["setting"] for row in passes)),
        {
            "pass@1": (BLUE, [row for row in passes if row["figure"].endswith("pass@1, points")]),
            "pass@16": (ORANGE, [row for row in passes if row["figure"].endswith("pass@16, points")]),
        },
    )
    drawn.set(title="with drawn tokens", xlabel="points that WINO adds")
    return figure


def _intervals(axes: Axes, settings: list[str], series: dict[str, tuple[str, list[dict[str, Any]]]]) -> None:
    """Figures with their intervals, a line for each setting."""
    for number, (label, (color, rows)) in enumerate(series.items()):
        places = [settings.index(row["setting"]) + 0.25 * number - 0.12 for row in rows]
        for place, row in zip(places, rows, strict=True):
            axes.plot([row["low"], row["high"]], [place, place], "-", color=color)
        axes.plot([row["value"] for row in rows], places, "o", color=color, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(settings)), labels=settings, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8.5)


def canvas() -> Figure:
    """A 6x6 sudoku as its canvas fills, step by step."""
    from remask import LLM, SamplingParams
    from remask.cli.trace import Frame, replay

    prompt = CANVAS["prompt"]
    params = SamplingParams(
        max_tokens=40, block_length=40, unmask=CANVAS["unmask"], remask=CANVAS["remask"], trace=True
    )
    with LLM("tiny", device="cpu", dtype="float32", max_num_rows=256) as llm:
        sample = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        assert llm.tokenizer is not None
        letters = [str(llm.tokenizer.decode([token])) for token in range(256)]
    assert sample.trace is not None
    frames = [Frame(0, [None] * 40, [], set(), set()), *replay(sample.trace, sample.nfe)]
    columns = 4
    lines = -(-len(frames) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(2.35 * columns, 2.65 * lines), layout="constrained", squeeze=False
    )
    for panel in panels.flat:
        panel.axis("off")
    for panel, frame in zip(panels.flat, frames, strict=False):
        panel.set(xlim=(-0.1, 6.1), ylim=(6.1, -0.1), aspect="equal")
        for cell in range(36):
            row, column = divmod(cell, 6)
            given = prompt[cell] != "."
            color = GREEN if cell in frame.committed else RED if cell in frame.remasked else "black"
            token = frame.tokens[cell]
            text = letters[token] if token is not None else prompt[cell] if frame.step == 0 and given else ""
            shade = "#eaeaea" if token is None else "#d8eee0" if cell in frame.committed else "white"
            panel.add_patch(
                Rectangle(
                    (column, row), 1, 1, facecolor="#f8d9d9" if color == RED else shade, edgecolor="#bbbbbb"
                )
            )
            panel.text(
                column + 0.5,
                row + 0.54,
                text,
                ha="center",
                va="center",
                color=color,
                fontweight="bold" if given else "normal",
            )
        for line in range(0, 7, 2):
            panel.plot([0, 6], [line, line], color="black", linewidth=1.2)
        for line in range(0, 7, 3):
            panel.plot([line, line], [0, 6], color="black", linewidth=1.2)
        changes = f"+{len(frame.committed)}" + (f" -{len(frame.remasked)}" if frame.remasked else "")
        title = f"step {frame.step}: {changes}" if frame.step else "puzzle; the canvas is empty"
        panel.set_title(title, fontsize=10)
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "canvas": canvas,
    "solved": solved,
    "study": study,
    "throughput": throughput,
}


def shown(name: str) -> Any:
    """What a picture is made from."""
    source = {
        "solved": ("evaluation", "results"),
        "study": ("study/summary", "claims"),
        "throughput": ("throughput", "results"),
    }
    if name not in source:
        return CANVAS
    file, part = source[name]
    return report(file)[part]


def digest(name: str) -> str:
    """A digest of what a picture shows."""
    return hashlib.sha256(json.dumps(shown(name), sort_keys=True).encode()).hexdigest()[:16]


def write(folder: Path) -> list[Path]:
    """Draws all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in PLOTS.items():
        paths.append(folder / f"{name}.png")
        figure = draw()
        figure.savefig(paths[-1], dpi=130, metadata={"Description": digest(name), "Software": None})
        plt.close(figure)
    return paths


if __name__ == "__main__":
    for path in write(IMAGES):
        sys.stdout.write(f"{path}\n")
