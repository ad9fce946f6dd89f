"""Evaluates a tiny checkpoint on held-out problems under each policy, its twin beside it, and writes JSON.

    python -m remask.benchmarks.tiny.evaluate --count 400 --output benchmarks/results/evaluation.json

Problems are the hardest that the trainer draws (half of the 6x6 cells blank, 9 of 16 in 4x4) or such as it
never draws (addition, text), from a seed of their own. Puzzles count when the answer is right; of free text
the words that the corpus knows count. The autoregressive twin answers greedily through transformers; its
forwards are the tokens it generates. Times are not reported: this is about quality and forwards. The text
task needs its corpus (`pip install 'remask[train]'`); without it, `--tasks` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remask import LLM
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.tiny.policies import POLICIES, ROOM, params
from remask.benchmarks.tiny.tasks import PUZZLES, Task
from remask.benchmarks.tiny.text import TEXT

EVALUATION_SEED = 2**31 + 1
TASKS: dict[str, Task] = {**PUZZLES, TEXT.name: TEXT}
TWIN = "twin, next token"
TWIN_DIRECTORY = Path(__file__).parent / "twin"
TWIN_BATCH = 100


def problems(task: Task, count: int) -> list[str]:
    """The first `count` held-out prompts of a task."""
    prompts, _ = task.held_out(np.random.default_rng([EVALUATION_SEED, task.answer_len]), count)
    return prompts


def evaluate(llm: LLM, task: Task, policy: str, count: int) -> dict[str, Any]:
    """Score and forwards of one policy on `count` problems."""
    prompts = problems(task, count)
    samples = [out.outputs[0] for out in llm.generate(prompts, params(policy, task.answer_len))]
    texts = [sample.text or "" for sample in samples]
    result = report(task, policy, prompts, texts, [sample.nfe for sample in samples])
    tokens_per_forward = float(np.mean([sample.tokens_per_forward for sample in samples]))
    return {**result, "tokens_per_forward": round(tokens_per_forward, 2)}


@torch.inference_mode()
def evaluate_twin(directory: Path, task: Task, count: int) -> dict[str, Any]:
    """Score and forwards of an autoregressive checkpoint on the same problems, decoded greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = problems(task, count)
    texts: list[str] = []
    nfe: list[int] = []
    for start in range(0, count, TWIN_BATCH):
        ids = tokenizer(prompts[start : start + TWIN_BATCH], return_tensors="pt")["input_ids"]
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.answer_len + ROOM, do_sample=False
        )[:, ids.shape[1] :]
        ends = generated == model.config.eos_token_id
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, generated.shape[1])
        nfe += lengths.tolist()
        texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return report(task, TWIN, prompts, texts, nfe)


def report(task: Task, policy: str, prompts: list[str], texts: list[str], nfe: list[int]) -> dict[str, Any]:
    scores = [task.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return {
        "task": task.name,
        "policy": policy,
        "count": len(scores),
        "score": round(float(np.mean(scores)), 4),
        "standard_error": round(float(np.std(scores) / len(scores) ** 0.5), 4),
        "nfe": round(float(np.mean(nfe)), 2),
    }


def table_header() -> list[str]:
    """The header of README's table."""
    measured = [f"{name} {'words known' if name == TEXT.name else 'solved'}" for name in TASKS]
    return ["policy", *(cell for column in measured for cell in (column, "forwards"))]


def table_cells(policy: str, results: list[dict[str, Any]]) -> list[str]:
    """A policy's row of README's table: score and forwards of every task."""
    row = [policy]
    for task in TASKS:
        (result,) = [r for r in results if (r["task"], r["policy"]) == (task, policy)]
        row += [f"{100 * result['score']:.1f} %", f"{result['nfe']:.1f}"]
    return row


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with LLM(args.model, dtype=args.dtype) as llm:
        for name in args.tasks:
            for policy in POLICIES:
                yield evaluate(llm, TASKS[name], policy, args.count)
            if args.twin.exists():
                yield evaluate_twin(args.twin, TASKS[name], args.count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--twin", type=Path, default=TWIN_DIRECTORY, help="left out where it is not there")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    results = []
    for result in run(args):
        results.append(result)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    content = {"environment": environment_stamp(), "results": results}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
