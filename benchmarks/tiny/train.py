"""Trains the embedded tiny model and its autoregressive twin on one CPU thread, resumably.

    python -m remask.benchmarks.tiny.train --state run/state.pt --log run/log.jsonl --out run/tiny
    python -m remask.benchmarks.tiny.train --state twin/state.pt --log twin/log.jsonl --out twin/twin \
        --objective causal

bf16 weights with fp32 masters; Muon on the matrices of the blocks, Adam on the rest, in the stages of
`recipe.py`. Every step draws its problems from (seed, step) alone: both objectives see the same ones in the
same order, and an interrupted run continues as if it had not been. `--init DIR --steps-done N` continues
from a checkpoint that has had its first N steps, with fresh optimizers. In the log `seconds` count from the
last start. The text task needs its corpus (`pip install 'remask[train]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from remask.benchmarks.tiny import checkpoint
from remask.benchmarks.tiny.model import Shape, TinyTransformer
from remask.benchmarks.tiny.objectives import OBJECTIVES
from remask.benchmarks.tiny.recipe import RECIPE, Stage
from remask.benchmarks.tiny.tasks import PUZZLES, Puzzle

ADAM_LR_FACTOR = 1 / 8  # of Muon's learning rate
MICRO_BATCH_TOKENS = 5000  # of one forward and backward pass


class Trainer:
    """Model, fp32 masters and optimizers; `step` runs one batch of one bucket in micro-batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.seed, self.batch_len, self.step_done = args.seed, args.batch, args.steps_done
        self.shape, self.objective = Shape(), OBJECTIVES[args.objective]
        self.model = TinyTransformer(self.shape, self.objective.causal)
        if args.init:
            checkpoint.read_llada(self.model, args.init)
        self.masters = {name: p.detach().clone().float() for name, p in self.model.named_parameters()}
        self.model.to(torch.bfloat16)
        matrices = [p for n, p in self.masters.items() if n.startswith("blocks") and p.ndim == 2]
        others = [p for n, p in self.masters.items() if not (n.startswith("blocks") and p.ndim == 2)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"),
            torch.optim.Adam(others, betas=(0.9, 0.98)),
        ]
        self.loss = torch.compile(self._loss, dynamic=False)

    def _loss(self, ids: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        logits = self.model(ids, target.shape[1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()

    def stage(self) -> tuple[Stage, int]:
        """The stage of the next step, and the step's number in it."""
        step = self.step_done
        for stage in RECIPE:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError(f"the recipe ends before step {self.step_done}")

    def step(self) -> dict[str, object]:
        stage, stage_step = self.stage()
        rng = np.random.default_rng([self.seed, self.step_done])
        shares = np.array([bucket.share for bucket in stage.buckets])
        bucket = stage.buckets[rng.choice(len(shares), p=shares / shares.sum())]
        problems = bucket.task.sample(rng, self.batch_len)
        ids, target, weights = self.objective.batch(rng, problems, bucket.canvas)
        micro = self._micro_batch_len(ids.shape[1])
        total = 0.0
        for part in zip(ids.split(micro), target.split(micro), weights.split(micro), strict=True):
            loss = self.loss(*part)
            loss.backward()
            total += loss.item()
        params = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            master.grad = params[name].grad.float()
            params[name].grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        lr = stage.lr * stage.lr_scale(stage_step)
        for optimizer, factor in zip(self.optimizers, (1, ADAM_LR_FACTOR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                params[name].copy_(master)
        self.step_done += 1
        return {
            "step": self.step_done,
            "task": bucket.task.name,
            "canvas": bucket.canvas,
            "lr": lr,
            "loss": round(total, 4),
        }

    def _micro_batch_len(self, seq_len: int) -> int:
        """The largest divisor of the batch that keeps to `MICRO_BATCH_TOKENS`: one shape to compile for."""
        sizes = (n for n in range(1, self.batch_len + 1) if self.batch_len % n == 0)
        return max(n for n in sizes if n == 1 or n * seq_len <= MICRO_BATCH_TOKENS)

    def solve_rate(self, puzzle: Puzzle, count: int = 64) -> float:
        """Share of held-out problems solved greedily at one token a step."""
        rng = np.random.default_rng([2**31, puzzle.answer_len])
        prompts, _ = puzzle.held_out(rng, count)
        answers = self.objective.answer(self.model, prompts, puzzle.answer_len)
        return sum(map(puzzle.is_correct, prompts, answers)) / count

    def save_state(self, path: Path) -> None:
        state = {
            "step": self.step_done,
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load_state(self, path: Path) -> None:
        state = torch.load(path)
        self.step_done = state["step"]
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
                params[name].copy_(master)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def export(self, directory: Path) -> None:
        """Writes the checkpoint in its published layout: config, weights (bf16), tokenizer."""
        self.objective.export(self.model, self.shape, directory)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="masked", help="tiny, or its twin")
    parser.add_argument("--batch", type=int, default=192, help="sequences a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", type=Path, help="checkpoint of tiny to continue")
    parser.add_argument("--steps-done", type=int, default=0, help="steps that the checkpoint has had")
    parser.add_argument("--state", type=Path, required=True, help="training state, written every 200 steps")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory, written at the end")
    args = parser.parse_args()
    if args.init and args.objective != "masked":
        parser.error("--init reads a checkpoint of the masked objective")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # a shape of every bucket
    for path in (args.state, args.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.state.exists():
        trainer.load_state(args.state)
    num_steps = sum(stage.steps for stage in RECIPE)
    started, losses = time.monotonic(), defaultdict(list)
    while trainer.step_done < num_steps:
        event = trainer.step()
        losses[event["task"]].append(event["loss"])
        step = trainer.step_done
        if step % 50 == 0 or step == num_steps:
            line = {
                "step": step,
                "seconds": round(time.monotonic() - started, 1),
                "lr": event["lr"],
                "loss": {name: round(float(np.mean(values)), 4) for name, values in sorted(losses.items())},
            }
            losses.clear()
            if step % 400 == 0 or step == num_steps:
                line["solved"] = {name: trainer.solve_rate(puzzle) for name, puzzle in PUZZLES.items()}
            with args.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % 200 == 0 or step == num_steps:
            trainer.save_state(args.state)
    trainer.export(args.out)


if __name__ == "__main__":
    main()
