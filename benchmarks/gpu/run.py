"""Everything that is measured on a GPU, in one call, as JSON and a chart:

    python3 benchmarks/gpu/run.py --output benchmarks/results/h200.json

The script runs from a checkout, without an installation, in an environment with torch (2.11 or newer),
Triton, transformers, safetensors, numpy, msgspec, typer and rich; nothing is downloaded. Weights are random,
in the shape of LLaDA-8B. `--small` runs the same on the embedded model, also on a CPU: a test of this script,
whose figures mean nothing.

Three stages run one after another, each in a process of its own with a limit of its own (`--stage-seconds`):

- `a`: the tests marked `gpu`, the golden cases, and equal tokens of engine and plain loop, in fp32.
- `b`: figures at LLaDA-8B's shape.
- `c`: a profile of single steps (kernels by time), and mixed requests against the plain loop.

A stage writes its JSON after every part, so a stage that is stopped loses only the part it was in; the parts
that did not finish are named. The stages' files are merged into `--output`. If that file exists, its figures
are kept in the new file under `earlier`.

The figures are:
- `gemm_tflops`: rate of a square bf16 product of 8,192.
- `step_share_ROWS`: arithmetic that a packed step needs over what the machine would do at that rate in the
  step's time.
- `batch1_over_floor`: a step of one request over the larger of reading the weights once and its products
  alone; `batch1_host_share`: how much of its time through the engine is not that step.
- `ratio_plain_batch1`, `ratio_plain_mixed`: visible tokens a second over those of the published code's way of
  decoding (padded batch, SDPA, all logits, fp64 softmax).
- `ratio_one_at_a_time_mixed`: over the engine with one request after another.
- `fp8_over_bf16`: time of a step of 8,192 rows in bf16 over fp8.
- `reuse_over_exact`: time of equal requests under exact decoding over their time with `reuse="both"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

STAGES = ("a", "b", "c")
KEYS = (
    "gemm_tflops",
    "step_share_4096",
    "step_share_8192",
    "batch1_over_floor",
    "batch1_host_share",
    "ratio_plain_batch1",
    "ratio_plain_mixed",
    "ratio_one_at_a_time_mixed",
    "fp8_over_bf16",
    "reuse_over_exact",
)


def make_importable() -> None:
    """If `remask` is not installed, makes the checkout's packages importable through a folder of links, here
    and in subprocesses."""
    if importlib.util.find_spec("remask") is not None:
        return
    folder = Path(tempfile.mkdtemp(prefix="remask-path-"))
    package = folder / "remask"
    package.mkdir()
    for entry in (ROOT / "engine").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("scheduler", "workers", "benchmarks"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def run_stage(stage: str, path: Path, seconds: float, options: list[str]) -> dict[str, Any]:
    """Runs one stage in a process of its own and returns what it wrote."""
    path.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage, "--output", str(path)]
    command += ["--stage-seconds", str(seconds), *options]
    started = time.perf_counter()
    try:
        status: int | str = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"figures": {}, "parts": {}, "errors": {}, "unfinished": ["all"]}
    path.unlink(missing_ok=True)
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), **content}


def merge(stages: dict[str, dict[str, Any]], earlier: dict[str, Any] | None, **facts: Any) -> dict[str, Any]:
    """The report of a run.

    Args:
        stages: what each stage wrote.
        earlier: the report of the run before; its figures are kept.
        facts: what else the report says.
    """
    figures = {key: value for content in stages.values() for key, value in content["figures"].items()}
    environment = next((c["environment"] for c in stages.values() if "environment" in c), None)
    report = {
        "environment": environment,
        **facts,
        "figures": {key: figures[key] for key in KEYS if key in figures},
        "missing": [key for key in KEYS if key not in figures],
        "stages": {
            stage: {name: value for name, value in content.items() if name not in ("environment", "figures")}
            for stage, content in stages.items()
        },
        "earlier": [],
    }
    if earlier is not None:
        before = {name: earlier[name] for name in ("environment", "figures") if name in earlier}
        report["earlier"] = [before, *earlier.get("earlier", [])]
    return report


def read_report(path: Path) -> dict[str, Any] | None:
    """The report in a file; None if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if "figures" in content else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a chart is written beside it")
    parser.add_argument("--device", help="default: cuda if torch sees a GPU, else cpu")
    parser.add_argument("--small", action="store_true", help="a small model, to try this script")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run")
    parser.add_argument("--stage-seconds", type=float, default=240, help="limit of each stage")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    make_importable()
    if args.stage is not None:
        from remask.benchmarks.gpu import stages

        stages.run(args.stage, args.output, args.device, small=args.small, seconds=args.stage_seconds)
        return
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda") and not args.small:
        parser.error("torch sees no GPU; --small tries the script on a CPU")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    earlier, options = read_report(args.output), ["--device", device, *["--small"] * args.small]
    contents: dict[str, dict[str, Any]] = {}
    for stage in args.stages:
        path = args.output.with_suffix(f".{stage}.json")
        contents[stage] = run_stage(stage, path, args.stage_seconds, options)
        report = merge(contents, earlier, small=args.small)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if "grid" in report["stages"].get("b", {}).get("parts", {}):
        from remask.benchmarks.gpu.figures import draw

        draw(report["stages"]["b"]["parts"]["grid"], args.output.with_suffix(".png"))
    for stage, content in contents.items():
        problems = {name: content[name] for name in ("errors", "unfinished") if content.get(name)}
        sys.stdout.write(
            f"stage {stage}: {content['seconds']:.0f} s, status {content['status']} {problems}\n"
        )
    sys.stdout.write(f"{args.output}: {json.dumps(report['figures'])}\n")
    if report["missing"]:
        sys.exit(f"not measured: {', '.join(report['missing'])}")


if __name__ == "__main__":
    main()
