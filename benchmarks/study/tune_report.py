"""What `remask study tune` says: a table, a sentence about remasking, a picture and a preset file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from rich.table import Table

from remask.benchmarks.study.tune import Gain, Result, Tuned, accuracy_interval

mpl.use("Agg")
from matplotlib import pyplot as plt

COSTS = {"nfe": "forwards", "milliseconds": "time"}


def table(tuned: Tuned) -> Table:
    """The settings with their figures on the reporting rows; the chosen ones are marked."""
    found = Table(title=f"on {tuned.num_reporting} rows that did not choose", title_justify="left")
    for name in ("", "unmask", "remask", "block", "accuracy (95 %)", "forwards", "ms a sample"):
        found.add_column(name, justify="left" if name in ("", "unmask", "remask") else "right")
    for result in tuned.finalists:
        own = result.candidate
        low, high = accuracy_interval(result.scores)
        found.add_row(
            "*" if result is tuned.chosen else "",
            own.unmask,
            own.remask or "",
            str(own.block),
            f"{100 * result.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{result.forwards:.1f}",
            f"{result.milliseconds:.1f}",
        )
    return found


def sentence(tuned: Tuned) -> str:
    """Whether remasking earned its cost."""
    if tuned.remasking is None or not tuned.gains:
        return "No setting with remasking was among the better half: it did not earn its cost."
    parts = [f"{_gain(gain)} at equal {COSTS[gain.cost]}" for gain in tuned.gains]
    earned = [COSTS[gain.cost] for gain in tuned.gains if gain.low > 0]
    if len(earned) == len(tuned.gains):
        verdict = "it earned its cost"
    elif earned:
        verdict = f"it earned its cost at equal {earned[0]} alone"
    elif all(gain.high < 0 for gain in tuned.gains):
        verdict = "it costs accuracy"
    else:
        verdict = "it is not shown to earn its cost"
    beyond = " It costs more than every setting without." if any(g.beyond for g in tuned.gains) else ""
    return f"Remasking ({tuned.remasking.candidate}) adds {' and '.join(parts)}: {verdict}.{beyond}"


def lines(tuned: Tuned) -> list[str]:
    """What stands below the table."""
    own = tuned.chosen.candidate
    found = [
        sentence(tuned),
        f"use: unmask {own.unmask}, remask {own.remask or 'none'}, block length {own.block} "
        f"(* in the table; chosen on {tuned.num_choosing} rows)",
    ]
    if not tuned.is_reached:
        found.append("No setting reaches the bound; these come nearest to it.")
    if tuned.num_failed:
        found.append(f"{tuned.num_failed} samples could not be judged; they count as wrong.")
    return found


def _gain(gain: Gain) -> str:
    return f"{100 * gain.difference:+.1f} points ({100 * gain.low:.1f} to {100 * gain.high:.1f})"


def draw(tuned: Tuned, path: Path) -> None:
    """Accuracy over forwards and over time."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    costs = (
        ("forwards a sample", lambda result: result.forwards),
        ("milliseconds a sample, in a batch", lambda result: result.milliseconds),
    )
    for axes, (name, cost) in zip(panels, costs, strict=True):
        for color, label, own in (
            ("C0", "without remasking", [r for r in tuned.finalists if r.candidate.remask is None]),
            ("C1", "with remasking", [r for r in tuned.finalists if r.candidate.remask is not None]),
        ):
            for result in own:
                low, high = accuracy_interval(result.scores)
                axes.plot([cost(result)] * 2, [100 * low, 100 * high], "-", color=color, alpha=0.5)
            axes.plot([cost(r) for r in own], [100 * r.accuracy for r in own], "o", color=color, label=label)
        axes.plot(
            [cost(tuned.chosen)],
            [100 * tuned.chosen.accuracy],
            "o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor="black",
            label="chosen",
        )
        axes.set(xlabel=name, xscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy, %")
    panels[1].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def preset(chosen: Result, model: str, tasks: Path) -> str:
    """A preset file of the chosen settings."""
    own, low_high = chosen.candidate, accuracy_interval(chosen.scores)
    low, high = (100 * bound for bound in low_high)
    block = own.block if isinstance(own.block, int) else f'"{own.block}"'
    lines = [
        f"# remask study tune, {datetime.now(UTC).date()}: model {model}, tasks {tasks}",
        f"# accuracy {100 * chosen.accuracy:.1f} % ({low:.1f} to {high:.1f}), {chosen.forwards:.1f} forwards",
        f'unmask = "{own.unmask}"',
        *([f'remask = "{own.remask}"'] if own.remask is not None else []),
        f"block_length = {block}",
        "temperature = 0.0",
        'rank = "proposal"',
    ]
    return "\n".join(lines) + "\n"
