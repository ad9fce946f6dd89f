"""Trains the embedded tiny model on its tasks, on one CPU thread, resumably.

    python -m remask.benchmarks.tiny.train --state run/state.pt --log run/log.jsonl --out run/tiny

Masked-diffusion training of an instruction model (LLaDA, arXiv 2502.09992, section 2): the prompt stays
visible, of the L canvas positions k are masked with k uniform on 1..L (stratified over the batch), and the
cross-entropy over the masked ones is weighted by 1/k. bf16 weights with fp32 masters; Muon on the matrices of
the blocks, Adam on the rest; constant learning rate with a warm-up and a linear decay over the last steps.
Every step draws its data from (seed, step), so a run that was interrupted goes on as if it had not been;
`--steps` may be changed on the way. In the log `seconds` count from the last start.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from remask.benchmarks.tiny import tokenizer as vocab
from remask.benchmarks.tiny.model import TrainableLLaDA
from remask.benchmarks.tiny.tasks import SUDOKU_4X4, SUDOKU_6X6, Sudoku

MASK_ID, EOS_ID, FIRST_BYTE = 0, 1, len(vocab.SPECIALS)


@dataclass(frozen=True)
class Shape:
    """The architecture: 2.76 million parameters."""

    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 4
    ffn: int = 512
    rope_theta: float = 10000.0
    vocab_size: int = vocab.VOCAB_SIZE


@dataclass(frozen=True)
class Bucket:
    """Batches of one task and canvas size; equal lengths need no padding, EOS fills up the answer."""

    task: Sudoku
    canvas: int
    share: float


BUCKETS = (
    Bucket(SUDOKU_6X6, 36, 0.22),
    Bucket(SUDOKU_6X6, 40, 0.26),
    Bucket(SUDOKU_6X6, 64, 0.07),
    Bucket(SUDOKU_6X6, 128, 0.07),
    Bucket(SUDOKU_4X4, 16, 0.12),
    Bucket(SUDOKU_4X4, 24, 0.16),
    Bucket(SUDOKU_4X4, 64, 0.05),
    Bucket(SUDOKU_4X4, 128, 0.05),
)


def encode(texts: list[str]) -> Tensor:
    tokenizer = vocab.byte_tokenizer()
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def draw_batch(rng: np.random.Generator, bucket: Bucket, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masked ids [count, P + L], targets [count, L] and weights [count, L] (zero where nothing is masked)."""
    prompts, answers = bucket.task.sample(rng, count)
    prompt, answer = encode(prompts), encode(answers)
    target = F.pad(answer, (0, bucket.canvas - answer.shape[1]), value=EOS_ID)
    strata = rng.permutation((np.arange(count) + rng.random(count)) / count)
    num_masked = np.minimum((strata * bucket.canvas).astype(int) + 1, bucket.canvas)
    order = np.argsort(rng.random((count, bucket.canvas)), axis=1).argsort(axis=1)
    masked = torch.from_numpy(order < num_masked[:, None])
    weights = masked / torch.from_numpy(num_masked)[:, None] / count
    return torch.cat([prompt, target.masked_fill(masked, MASK_ID)], dim=1), target, weights.float()


class Trainer:
    """Model, fp32 masters and optimizers; `step` runs one batch of one bucket in micro-batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.shape, self.step_done = args, Shape(), 0
        self.model = TrainableLLaDA(**asdict(self.shape))
        if args.init:
            state = load_file(Path(args.init) / "model.safetensors")
            self.model.load_state_dict({k.removeprefix("model.transformer."): v for k, v in state.items()})
        self.masters = {name: p.detach().clone().float() for name, p in self.model.named_parameters()}
        self.model.to(torch.bfloat16)
        matrices = [p for n, p in self.masters.items() if n.startswith("blocks") and p.ndim == 2]
        others = [p for n, p in self.masters.items() if not (n.startswith("blocks") and p.ndim == 2)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"),
            torch.optim.Adam(others, lr=args.lr / 8, betas=(0.9, 0.98)),
        ]
        self.base_lrs = [args.lr, args.lr / 8]
        self.loss = torch.compile(self._loss, dynamic=False)

    def _loss(self, ids: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        logits = self.model(ids, ids.shape[1] - target.shape[1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()

    def lr_scale(self) -> float:
        step, args = self.step_done, self.args
        return min(1.0, (step + 1) / args.warmup, max(0.0, (args.steps - step) / args.decay))

    def step(self) -> dict[str, object]:
        rng = np.random.default_rng([self.args.seed, self.step_done])
        shares = [bucket.share for bucket in BUCKETS]
        bucket = BUCKETS[rng.choice(len(BUCKETS), p=np.array(shares) / sum(shares))]
        ids, target, weights = draw_batch(rng, bucket, self.args.batch)
        micro = 64 if ids.shape[1] < 100 else 32
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
        scale = self.lr_scale()
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                params[name].copy_(master)
        self.step_done += 1
        return {
            "step": self.step_done,
            "task": bucket.task.name,
            "canvas": bucket.canvas,
            "loss": round(total, 4),
        }

    @torch.no_grad()
    def solve_rate(self, task: Sudoku, count: int = 64) -> float:
        """Share of held-out puzzles solved at one token a step, the most confident first."""
        prompts, _ = task.sample(np.random.default_rng([2**31, task.size]), count, blanks=task.max_blanks)
        prompt = encode(prompts)
        canvas = torch.full((count, task.num_cells), MASK_ID)
        for _ in range(task.num_cells):
            logits = self.model(torch.cat([prompt, canvas], dim=1), prompt.shape[1]).float()
            logits[..., MASK_ID] = -torch.inf
            confidence, proposal = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(canvas != MASK_ID, -1).argmax(-1, keepdim=True)
            canvas.scatter_(1, best, proposal.gather(1, best))
        decode = vocab.byte_tokenizer().decode_batch(canvas.tolist())
        return sum(map(task.is_correct, prompts, decode)) / count

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
        """Writes the checkpoint in the published layout: config, weights (bf16), tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        shape = self.shape
        config = {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "d_model": shape.d_model,
            "n_heads": shape.n_heads,
            "n_kv_heads": shape.n_heads,
            "n_layers": shape.n_layers,
            "mlp_hidden_size": shape.ffn,
            "activation_type": "silu",
            "block_type": "llama",
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": shape.rope_theta,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "rms_norm_eps": 1e-5,
            "include_bias": False,
            "include_qkv_bias": False,
            "bias_for_layer_norm": False,
            "attention_layer_norm": False,
            "alibi": False,
            "vocab_size": shape.vocab_size,
            "embedding_size": shape.vocab_size,
            "weight_tying": False,
            "input_emb_norm": False,
            "scale_logits": False,
            "max_sequence_length": 512,
            "mask_token_id": MASK_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": EOS_ID,
            "eot_token_id": 2,
            "torch_dtype": "bfloat16",
        }
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(self.model.export_state(), directory / "model.safetensors", metadata={"format": "pt"})
        vocab.save(directory)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2200, help="total number of optimizer steps")
    parser.add_argument("--decay", type=int, default=600, help="steps of the final linear decay")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch", type=int, default=192, help="sequences a step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate; Adam's is an eighth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", help="checkpoint directory to start from")
    parser.add_argument("--state", type=Path, required=True, help="training state, written every 200 steps")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory, written at the end")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    for path in (args.state, args.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.state.exists():
        trainer.load_state(args.state)
    started, losses = time.monotonic(), {task.name: [] for task in (SUDOKU_4X4, SUDOKU_6X6)}
    while trainer.step_done < args.steps:
        event = trainer.step()
        losses[event["task"]].append(event["loss"])
        step = trainer.step_done
        if step % 50 == 0 or step == args.steps:
            line = {
                "step": step,
                "seconds": round(time.monotonic() - started, 1),
                "lr": trainer.lr_scale() * args.lr,
            }
            line["loss"] = {
                name: round(float(np.mean(values)), 4) for name, values in losses.items() if values
            }
            losses = {name: [] for name in losses}
            if step % 400 == 0 or step == args.steps:
                line["solved"] = {task.name: trainer.solve_rate(task) for task in (SUDOKU_4X4, SUDOKU_6X6)}
            with args.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % 200 == 0 or step == args.steps:
            trainer.save_state(args.state)
    trainer.export(args.out)


if __name__ == "__main__":
    main()
