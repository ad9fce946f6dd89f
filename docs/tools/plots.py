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


PLOTS: dict[str, Callable[[], Figure]] = {"canvas": canvas, "solved": solved, "throughput": throughput}


def shown(name: str) -> Any:
    """What a picture is made from."""
    source = {"solved": "evaluation", "throughput": "throughput"}
    return report(source[name])["results"] if name in source else CANVAS


def digest(name: str) -> str:
    """Tells one state of what a picture shows from another."""
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
