"""A run on a GPU for readers: a table of its figures and a chart of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADER = ("measured", "result")


def cells(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table.

    Args:
        report: what `run` writes, with all figures; runs from before reused keys have none of these.
    """
    f, parts = report["figures"], {}
    for stage in report["stages"].values():
        parts |= stage["parts"]
    one, seconds = parts["one request"], parts["mixed workload"]["engine_seconds"]
    return [
        ("bf16 product of 8,192", f"{f['gemm_tflops']:.0f} TFLOP/s"),
        ("copy, bytes read and written", f"{parts['machine']['gigabytes_per_second'] / 1000:.2f} TB/s"),
        ("step of 4,096 rows", share(parts, f, 4096)),
        ("step of 8,192 rows", share(parts, f, 8192)),
        ("fp8, step of 8,192 rows", f"{f['fp8_over_bf16']:.2f} times as fast as bf16"),
        (
            "one request, step",
            f"{one['batch1_ms']:.1f} ms, {f['batch1_over_floor']:.2f} times its floor",
        ),
        ("one request, host", f"{100 * f['batch1_host_share']:.0f} % of the time"),
        ("one request against the plain loop", f"{f['ratio_plain_batch1']:.2f} times as fast"),
        (
            "mixed requests against static batches of the plain loop",
            f"{f['ratio_plain_mixed']:.2f} times as fast, in {seconds:.1f} s",
        ),
        ("mixed requests against one at a time", f"{f['ratio_one_at_a_time_mixed']:.2f} times as fast"),
        *(
            [("reused keys", f"{f['reuse_over_exact']:.2f} times as fast as exact decoding")]
            if "reuse_over_exact" in f
            else []
        ),
        ("golden cases in fp32", f"{parts['golden cases']['equal_cases_fp32']} equal"),
        ("requests of the plain loop in fp32", f"{parts['equal tokens']['equal_requests_fp32']} equal"),
    ]


def share(parts: dict[str, Any], figures: dict[str, float], num_rows: int) -> str:
    """Time of a packed step and its share of the matrix rate."""
    step_ms = parts["packed steps"][f"step_ms_{num_rows}"]
    return f"{step_ms:.1f} ms, {100 * figures[f'step_share_{num_rows}']:.0f} % of that rate"


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
