"""What products in fp8 do to the embedded model's answers.

    python -m remask.benchmarks.fp8_quality --output benchmarks/results/fp8_quality.json

The held-out problems of `remask.benchmarks.tiny.evaluate` in fp32, bf16 and bf16 with `quantization="fp8"`.
Answers are compared problem by problem, so that the uncertainty of a difference is that of the problems that
differ. The CPU multiplies the same rounded numbers as a GPU's fp8 units and sums them in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from remask import LLM
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.throughput import write_report
from remask.benchmarks.tiny.evaluate import TASKS, problems
from remask.benchmarks.tiny.policies import COMPARED, params

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "quantization": "fp8"},
}
HEADER = (
    "task",
    "policy",
    "bf16 solved",
    "fp8 solved",
    "difference",
    "bf16 writes what fp32 writes",
    "fp8 writes what bf16 writes",
    "forwards in bf16",
    "in fp8",
)


def answers(variant: str, policy: str, task: str, count: int) -> tuple[list[str], list[float], float]:
    """Texts and scores of a task's problems, and the mean number of forwards."""
    asked, prompts = TASKS[task], problems(TASKS[task], count)
    with LLM("tiny", device="cpu", **VARIANTS[variant]) as llm:
        outputs = llm.generate(prompts, params(policy, asked.answer_len), use_tqdm=False)
    samples = [output.outputs[0] for output in outputs]
    texts = [sample.text or "" for sample in samples]
    scores = [asked.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return texts, scores, float(np.mean([sample.nfe for sample in samples]))


def compare(policy: str, task: str, count: int) -> dict[str, Any]:
    """One line of the table: scores, the mean difference with its standard error, and equal texts."""
    texts, scores, forwards = {}, {}, {}
    for variant in VARIANTS:
        texts[variant], scores[variant], forwards[variant] = answers(variant, policy, task, count)
    difference = np.subtract(scores["fp8"], scores["bfloat16"])

    def equal(one: str, other: str) -> float:
        return round(float(np.mean(np.equal(texts[one], texts[other]))), 4)

    return {
        "task": task,
        "policy": policy,
        "count": count,
        "scores": {variant: round(float(np.mean(own)), 4) for variant, own in scores.items()},
        "nfe": {variant: round(own, 2) for variant, own in forwards.items()},
        "fp8_minus_bfloat16": round(float(difference.mean()), 4),
        "standard_error": round(float(difference.std() / count**0.5), 4),
        "bfloat16_equals_float32": equal("bfloat16", "float32"),
        "fp8_equals_bfloat16": equal("fp8", "bfloat16"),
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A row of README's table."""
    scores, nfe = result["scores"], result["nfe"]
    difference, error = (100 * result[name] for name in ("fp8_minus_bfloat16", "standard_error"))
    return [
        result["task"],
        result["policy"],
        f"{100 * scores['bfloat16']:.1f} %",
        f"{100 * scores['fp8']:.1f} %",
        f"{difference:+.1f} ({error:.1f})",
        f"{100 * result['bfloat16_equals_float32']:.0f} %",
        f"{100 * result['fp8_equals_bfloat16']:.0f} %",
        f"{nfe['bfloat16']:.1f}",
        f"{nfe['fp8']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for task in args.tasks:
        for policy in COMPARED:
            results.append(compare(policy, task, args.count))
            Console().print(" | ".join(cells(results[-1])), soft_wrap=True)
    write_report({"environment": environment_stamp(), "results": results}, args.output)


if __name__ == "__main__":
    main()
