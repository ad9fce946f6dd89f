"""Tables of the committed measurements, and what they stand on, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from remask.benchmarks import (
    batch_invariance,
    exactness,
    families,
    fp8_quality,
    golden,
    latency,
    ray_data,
    ray_workers,
    reuse,
    scaling,
    scheduling,
    scoring,
    study_speed,
    throughput,
    tuning,
    weights,
)
from remask.benchmarks.gpu import figures
from remask.benchmarks.serving import compare, ray_serve, server_cost
from remask.benchmarks.tiny import evaluate, reuse_quality

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Table(NamedTuple):
    """Cells of a table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@cache
def report(name: str) -> dict[str, Any]:
    """A committed measurement, `benchmarks/results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured() -> list[str]:
    """The names of all committed measurements."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def _batch_file(found: dict[str, Any]) -> Table:
    rss, rates = found["rss_mb_after_first_minute"], found["lines_per_second"]
    return Table(
        ("measured", "result"),
        [
            ("lines", f"{found['lines']:,}"),
            ("`run-batch`, lines a second", f"{rates['batch']:.1f}"),
            ("one `LLM.generate` call, lines a second", f"{rates['generate']:.1f}"),
            ("rate of `run-batch` to that of `generate`", f"{found['rate_of_batch_to_generate']:.1%}"),
            (
                "resident memory of `run-batch` after the first minute",
                f"{rss['min']:.0f} to {rss['max']:.0f} MB",
            ),
            ("resident memory of `generate` at the end", f"{found['rss_mb_of_generate_at_end']:.0f} MB"),
        ],
    )


def _chaos(found: dict[str, Any]) -> Table:
    names = {
        "requests": "requests of a run",
        "runs": "runs",
        "seconds": "seconds",
        "killed_workers": "workers killed",
        "removed_nodes": "nodes removed",
        "missing_or_repeated": "requests lost or repeated",
        "changed": "requests whose tokens, forwards or confidences changed",
        "actors_left": "actors left",
        "processes_left": "processes left",
    }
    return Table(
        ("measured", "result"), [(text, f"{found['results'][key]:g}") for key, text in names.items()]
    )


def _evaluation(found: dict[str, Any]) -> Table:
    results = found["results"]
    policies = dict.fromkeys(result["policy"] for result in results)
    return Table(evaluate.table_header(), [evaluate.table_cells(policy, results) for policy in policies])


def _exactness(found: dict[str, Any]) -> Table:
    columns = [(f"distance, blocks of {n}", "bits", "forwards") for n in exactness.BLOCK_LENS]
    policies = (exactness.CHAIN, *exactness.POLICIES)
    return Table(
        ("policy", *(name for column in columns for name in column)),
        [exactness.table_cells(policy, found["results"]) for policy in policies],
    )


def _milliseconds(names: dict[str, str]) -> Callable[[dict[str, Any]], Table]:
    def table(found: dict[str, Any]) -> Table:
        results = found["results"]
        return Table(
            ("measured", "median (min to max)"),
            [(names[n], throughput.format_spread(results[n])) for n in names],
        )

    return table


def _plan(found: dict[str, Any]) -> Table:
    return Table(
        ("canvases", "planned ms a step", "real ms a step", "planned / real"),
        [
            (
                str(check["batch_size"]),
                f"{check['planned_ms']:.0f}",
                f"{check['real_ms']:.0f}",
                f"{check['planned_over_real']:.2f}",
            )
            for check in found["check"]
        ],
    )


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "batch_file": _batch_file,
    "batch_invariance": lambda found: Table(
        batch_invariance.HEADER,
        [batch_invariance.cells(result) for result in found["results"]],
    ),
    "chaos": _chaos,
    "compare": lambda found: Table(
        compare.HEADER, [compare.table_cells(r, found["quality"]) for r in compare.ordered(found)]
    ),
    "evaluation": _evaluation,
    "exactness": _exactness,
    "fp8_quality": lambda found: Table(
        fp8_quality.HEADER, [fp8_quality.cells(result) for result in found["results"]]
    ),
    "families": lambda found: Table(families.HEADER, [families.cells(result) for result in found["results"]]),
    "golden": lambda found: Table(
        golden.HEADER, [golden.cells(name, r, found["cases"]) for name, r in found["results"].items()]
    ),
    "h200": lambda found: Table(figures.HEADER, figures.cells(found)),
    "latency": lambda found: Table(
        latency.HEADER, [latency.cells(name, result) for name, result in found["results"].items()]
    ),
    "mixed_policies": _milliseconds(
        {
            "mixed_ms": "a step of one batch of all triples, ms",
            "uniform_ms": "mean step of the batches of one triple, ms",
            "ratio": "times as long",
        }
    ),
    "plan": _plan,
    "ray_data": lambda found: Table(ray_data.HEADER, [ray_data.cells(result) for result in found["results"]]),
    "ray_serve": lambda found: Table(
        ray_serve.HEADER, [ray_serve.cells(result) for result in found["results"]]
    ),
    "ray_workers": lambda found: Table(
        ("workers", "seconds on Ray", "seconds in process", "Ray times as fast (min to max)"),
        [ray_workers.cells(result) for result in found["results"]],
    ),
    "reuse": lambda found: Table(reuse.HEADER, [reuse.cells(result) for result in found["results"]]),
    "reuse_quality": lambda found: Table(
        reuse_quality.HEADER, [reuse_quality.cells(result) for result in found["results"]]
    ),
    "scaling": lambda found: Table(
        (
            *("workers", "live canvases", "bursts a second", "million canvas-steps a second"),
            *("us a canvas and burst", "ms to encode a burst"),
        ),
        [scaling.cells(result) for result in found["results"]],
    ),
    "scheduling": lambda found: Table(
        (
            *("live canvases", "64 scheduled: us a canvas and step", "all scheduled: us a canvas and step"),
            *("us a waiting canvas and step", "us a request"),
        ),
        [scheduling.cells(result) for result in found["results"]],
    ),
    "scoring": lambda found: Table(scoring.HEADER, [scoring.cells(result) for result in found["results"]]),
    "server_cost": lambda found: Table(
        server_cost.HEADER, [server_cost.cells_of(result) for result in found["results"]]
    ),
    "study_speed": lambda found: Table(
        study_speed.HEADER, [study_speed.cells_of(result) for result in found["results"]]
    ),
    "weights": lambda found: Table(weights.HEADER, [weights.cells(result) for result in found["results"]]),
    "step_cost": _milliseconds(
        {
            "model_ms": "the model, ms a step",
            "step_beside_model_ms": "the rest of the step, ms",
            "burst_beside_step_ms": "once a burst, ms",
            "rebuild_ms": "a rebuild of 256 canvases, ms of one thread",
        }
    ),
    "throughput": lambda found: Table(
        (
            *("decoder", "equal", "NFE", "rows/forward", "seconds", "tokens/s"),
            *("times as fast (min to max)", "GEMM rate used (min to max)"),
        ),
        [throughput.cells(name, result) for name, result in found["results"].items()],
    ),
    "tuning": lambda found: Table(tuning.HEADER, [tuning.cells(result) for result in found["results"]]),
}


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def benchmark(name: str) -> str:
    """The table of a measurement, and what it stands on: machine, versions, date and commit."""
    found = report(name)
    return "\n\n".join([markdown(TABLES[name](found)), stamp(name), *map(str, found.get("notes", ()))])


def benchmark_index() -> str:
    """Links to the pages of all measurements, with machine and date."""
    rows = []
    for name in measured():
        environment = report(name)["environment"]
        title = (ROOT / "docs" / "benchmarks" / f"{name}.md").read_text(encoding="utf-8").splitlines()[0]
        machine = environment["gpu"] or environment["cpu"]
        rows.append((f"[{title.removeprefix('# ')}]({name}.md)", machine, environment["date"]))
    return markdown(Table(("measurement", "machine", "date"), rows))


def stamp(name: str) -> str:
    """A sentence that names a measurement's file, machine, versions, date and commit."""
    found = report(name)
    repeated = f" {found['repetitions']} repetitions." if "repetitions" in found else ""
    return source(f"benchmarks/results/{name}.json", found["environment"]) + repeated


def source(path: str, environment: dict[str, Any]) -> str:
    """A sentence that names a file and where its figures were measured."""
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} thread(s)"
    packages = ("torch", "triton", "transformers", "ray")
    versions = [f"{p} {environment['versions'][p]}" for p in packages if environment["versions"].get(p)]
    return (
        f"Source: `{path}`, measured on {environment['date']} at commit `{environment['commit']}` on "
        f"{machine} (Python {environment['python']}, {', '.join(versions)})."
    )
