"""The chart of a run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(grid: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step over its rows, a line for each number of requests.

    Args:
        grid: what the part `grid` of `stages` returns.
        path: PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    points, knee_rows = grid["points"], grid["knee_rows"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for num_requests in sorted({point["requests"] for point in points}):
        own = [point for point in points if point["requests"] == num_requests]
        label = f"{num_requests} request{'s' * (num_requests > 1)}"
        axes.plot([p["rows"] for p in own], [p["step_ms"] for p in own], marker="o", label=label)
    axes.axvline(knee_rows, color="gray", linestyle="--", label=f"knee: {knee_rows:,} rows")
    axes.set(xscale="log", yscale="log", xlabel="rows of a step", ylabel="milliseconds of a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
