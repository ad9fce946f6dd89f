"""Speed on the golden Fast-dLLM cases: the engine against the plain loop, at equal tokens and forwards.

    python -m remask.benchmarks.golden --output benchmarks/results/golden.json

Runs interleaved repetitions on one thread: the plain loop in fp32 (one request at a time), the engine in fp32
and the engine in bf16 (all requests at once). Ratios are taken within a repetition. The engine in fp32 must
write the reference tokens with the reference's forwards, and so must the plain loop; bf16 rounds differently,
so its tokens and forwards are reported beside its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from remask import LLM, SamplingParams, Threshold
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.plain_canvas import Decoded
from remask.benchmarks.plain_loop import decode
from remask.benchmarks.throughput import format_spread, spread
from remask.workers.models.denoiser import load_denoiser

Cases = list[dict[str, Any]]
HEADER = ("decoder", "equal cases", "NFE", "median seconds", "times as fast (min to max)")


def read_cases(directory: Path, policy: str) -> Cases:
    """The golden cases of one reference decoder."""
    cases = json.loads((directory / "llada_decoding.json").read_text())["cases"]
    return [case for case in cases if case["policy"] == policy]


def params_of(case: dict[str, Any]) -> SamplingParams:
    params = case["params"]
    return SamplingParams(
        max_tokens=params["gen_length"],
        block_length=params["block_length"],
        unmask=Threshold(params["threshold"]),
        ignore_eos=True,
    )


def plain_loop(checkpoint: Path, cases: Cases) -> Callable[[], list[Decoded]]:
    model = load_denoiser(checkpoint, dtype="float32", device="cpu")
    return lambda: [decode(model, case["prompt"], params_of(case)) for case in cases]


def engine(
    checkpoint: Path, cases: Cases, dtype: Literal["float32", "bfloat16"]
) -> Callable[[], list[Decoded]]:
    llm = LLM(checkpoint, dtype=dtype, device="cpu")
    prompts, params = [case["prompt"] for case in cases], [params_of(case) for case in cases]

    def run() -> list[Decoded]:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [Decoded(output.outputs[0].token_ids, output.outputs[0].nfe) for output in outputs]

    return run


def measure(checkpoint: Path, cases: Cases, repetitions: int) -> dict[str, Any]:
    """Seconds of each contender in every repetition, what it wrote, and the ratios to the plain loop."""
    contenders = {
        "plain loop, float32": plain_loop(checkpoint, cases),
        "engine, float32": engine(checkpoint, cases, "float32"),
        "engine, bfloat16": engine(checkpoint, cases, "bfloat16"),
    }
    expected = [Decoded(case["output"], case["nfe"]) for case in cases]
    results: dict[str, Any] = {}
    for name, run in contenders.items():
        written = run()  # warms up, too
        results[name] = {
            "equal_cases": sum(a == b for a, b in zip(written, expected, strict=True)),
            "nfe": sum(decoded.nfe for decoded in written),
            "seconds": [],
        }
    for _ in range(repetitions):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            results[name]["seconds"].append(round(time.perf_counter() - started, 4))
    base = results["plain loop, float32"]["seconds"]
    for result in results.values():
        ratios = [a / b for a, b in zip(base, result["seconds"], strict=True)]
        result["times_as_fast"] = spread(ratios)
    return {"cases": len(cases), "repetitions": repetitions, "results": results}


def cells(decoder: str, result: dict[str, Any], num_cases: int) -> list[str]:
    """A decoder's row, under `HEADER`."""
    return [
        decoder,
        f"{result['equal_cases']}/{num_cases}",
        str(result["nfe"]),
        f"{statistics.median(result['seconds']):.2f}",
        format_spread(result["times_as_fast"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, default=Path("tests/data/golden"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = read_cases(args.golden, "fastdllm")
    report = {
        "environment": environment_stamp(),
        **measure(args.golden / "llada-tiny", cases, args.repetitions),
    }
    table = Table(*HEADER)
    for name, result in report["results"].items():
        table.add_row(*cells(name, result, report["cases"]))
    Console().print(table)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if report["results"]["engine, float32"]["equal_cases"] != len(cases):
        sys.exit("the engine did not write the reference tokens")


if __name__ == "__main__":
    main()
