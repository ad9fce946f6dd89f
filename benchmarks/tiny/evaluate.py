"""Evaluates a tiny checkpoint on held-out puzzles under each policy and writes JSON.

    python -m remask.benchmarks.tiny.evaluate --count 400 --output benchmarks/tiny/evaluation.json

Problems are the hardest the trainer draws (half of the 6x6 cells blank, 9 of 16 in 4x4), from a seed of
their own; an answer counts when it keeps the givens and the rules. Times are not reported: this is
about quality and forwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from remask import LLM
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.tiny.policies import POLICIES, params
from remask.benchmarks.tiny.tasks import TASKS, Sudoku

EVALUATION_SEED = 2**31 + 1


def evaluate(llm: LLM, task: Sudoku, policy: str, count: int) -> dict[str, Any]:
    """Solve rate and forwards of one policy on `count` problems."""
    rng = np.random.default_rng([EVALUATION_SEED, task.size])
    prompts, _ = task.sample(rng, count, blanks=task.max_blanks)
    samples = [out.outputs[0] for out in llm.generate(prompts, params(policy, task.num_cells))]
    solved = [task.is_correct(p, s.text or "") for p, s in zip(prompts, samples, strict=True)]
    return {
        "task": task.name,
        "policy": policy,
        "count": count,
        "solved": round(float(np.mean(solved)), 4),
        "standard_error": round(float(np.std(solved) / count**0.5), 4),
        "nfe": round(float(np.mean([s.nfe for s in samples])), 2),
        "tokens_per_forward": round(float(np.mean([s.tokens_per_forward for s in samples])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    results = []
    with LLM(args.model, dtype=args.dtype) as llm:
        for task in TASKS.values():
            for policy in POLICIES:
                results.append(evaluate(llm, task, policy, args.count))
                sys.stdout.write(json.dumps(results[-1]) + "\n")
                sys.stdout.flush()
    report = {"environment": environment_stamp(), "results": results}
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
