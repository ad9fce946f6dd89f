"""The two training objectives over the same problems: masked diffusion for tiny, next token for its twin.

A batch is (ids, target, weights): ids [B, S], of whose last L positions the model's logits are compared with
target [B, L]; weights [B, L] are zero where nothing is asked, and sum to one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from remask.benchmarks.tiny import checkpoint
from remask.benchmarks.tiny import tokenizer as vocab
from remask.benchmarks.tiny.model import Shape, TinyTransformer
from remask.benchmarks.tiny.tasks import Problems

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]


class Objective(Protocol):
    causal: bool

    def batch(self, rng: np.random.Generator, problems: Problems, canvas: int) -> Batch:
        """Ids, targets and weights of problems whose canvas has `canvas` tokens."""
        ...

    def answer(self, model: TinyTransformer, prompts: list[str], answer_len: int) -> list[str]:
        """Greedy answers, one token a step."""
        ...

    def export(self, model: TinyTransformer, shape: Shape, directory: Path) -> None:
        """Writes a checkpoint in the published layout."""
        ...


class Masked:
    """Masked diffusion of an instruction model (LLaDA, arXiv 2502.09992, section 2).

    The prompt is visible; of the L canvas positions k are masked, with k uniform on 1..L (stratified over the
    batch), and the cross-entropy over the masked ones is weighted by 1/k.
    """

    causal = False

    def batch(self, rng: np.random.Generator, problems: Problems, canvas: int) -> Batch:
        prompt, target = encode(problems[0]), _filled(problems[1], canvas)
        count = len(prompt)
        strata = rng.permutation((np.arange(count) + rng.random(count)) / count)
        num_masked = np.minimum((strata * canvas).astype(int) + 1, canvas)
        order = np.argsort(rng.random((count, canvas)), axis=1).argsort(axis=1)
        masked = torch.from_numpy(order < num_masked[:, None])
        weights = masked / torch.from_numpy(num_masked)[:, None] / count
        return torch.cat([prompt, target.masked_fill(masked, vocab.MASK_ID)], dim=1), target, weights.float()

    @torch.no_grad()
    def answer(self, model: TinyTransformer, prompts: list[str], answer_len: int) -> list[str]:
        prompt = encode(prompts)
        canvas = torch.full((len(prompts), answer_len), vocab.MASK_ID)
        for _ in range(answer_len):
            logits = model(torch.cat([prompt, canvas], dim=1), answer_len).float()
            logits[..., vocab.MASK_ID] = -torch.inf
            confidence, proposal = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(canvas != vocab.MASK_ID, -1).argmax(-1, keepdim=True)
            canvas.scatter_(1, best, proposal.gather(1, best))
        return vocab.byte_tokenizer().decode_batch(canvas.tolist())

    def export(self, model: TinyTransformer, shape: Shape, directory: Path) -> None:
        checkpoint.write_llada(model, shape, directory)


class Causal:
    """Next-token prediction of the answer and the token that ends it; the canvas beyond them is left out."""

    causal = True

    def batch(self, rng: np.random.Generator, problems: Problems, canvas: int) -> Batch:
        prompt, answers = encode(problems[0]), problems[1]
        lengths = torch.tensor([len(answer) for answer in answers]).clamp_max(canvas - 1) + 1
        longest = canvas if len(set(map(len, answers))) > 1 else int(lengths[0])
        target = _filled(answers, longest)
        asked = torch.arange(longest) < lengths[:, None]
        return torch.cat([prompt, target[:, :-1]], dim=1), target, asked / asked.sum()

    @torch.no_grad()
    def answer(self, model: TinyTransformer, prompts: list[str], answer_len: int) -> list[str]:
        ids = encode(prompts)
        for _ in range(answer_len):
            ids = torch.cat([ids, model(ids, 1)[:, -1].argmax(-1, keepdim=True)], dim=1)
        return vocab.byte_tokenizer().decode_batch(ids[:, -answer_len:].tolist())

    def export(self, model: TinyTransformer, shape: Shape, directory: Path) -> None:
        checkpoint.write_llama(model, shape, directory)


OBJECTIVES: dict[str, Objective] = {"masked": Masked(), "causal": Causal()}


def encode(texts: list[str]) -> Tensor:
    """Ids [B, S] of texts of equal length."""
    return torch.tensor([encoding.ids for encoding in vocab.byte_tokenizer().encode_batch(texts)])


def _filled(answers: list[str], length: int) -> Tensor:
    """Ids [B, length]: the answers and EOS behind them."""
    encodings = vocab.byte_tokenizer().encode_batch(answers)
    rows = [torch.tensor(encoding.ids) for encoding in encodings]
    return torch.stack([F.pad(row, (0, length - len(row)), value=vocab.EOS_ID) for row in rows])
