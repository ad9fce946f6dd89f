"""Likelihoods: `LLM.score` against the published loop over the same weights, in interleaved repetitions.

    python -m remask.benchmarks.scoring --output benchmarks/results/scoring.json

The *plain loop* does what LLaDA's `get_log_likelihood.py` does, a sample at a time: a forward of the whole
sequence, logits of every row, and the log-probabilities of the masked tokens. Both sides take the same masks.
*Choices* are the answers of a multiple-choice question, of a few tokens, whose masks repeat; *texts* are
longer continuations, whose masks do not. A ratio is taken within a repetition, on one CPU thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from remask import LLM
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import find_model
from remask.scoring import Score, draw_masks
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.rows.pack import PackedRows

MODEL = "llada-124m"
PROMPT_LEN = 64
HEADER = ("continuations", "tokens of each", "samples of each", *repeated.RATES)


class Case(NamedTuple):
    """Continuations of one prompt."""

    name: str
    lens: tuple[int, ...]
    num_samples: int


CASES = (Case("choices", (1, 2, 4, 6), 128), Case("texts", (32, 48), 32))


@torch.inference_mode()
def plain_loop(
    model: TransformerDenoiser, prompt: Sequence[int], continuation: Sequence[int], num_samples: int
) -> float:
    """The log-likelihood, a forward for each sample."""
    length = len(prompt) + len(continuation)
    every, bounds = torch.arange(length), (0, length)
    layout, attention = VarlenLayout(bounds, bounds, ()), SdpaAttention()
    target = torch.tensor(continuation)
    masks, samples = draw_masks(len(continuation), num_samples, 0)
    estimates = []
    for mask in torch.from_numpy(masks[samples]):
        ids = torch.tensor([*prompt, *continuation])
        ids[len(prompt) :][mask] = model.mask_id
        logits = model.model.logits(
            model.model(PackedRows(ids, every, layout, every, layout, every, length), attention)
        )
        own = logits[len(prompt) :][mask].float().log_softmax(-1).gather(1, target[mask].unsqueeze(1))
        estimates.append(float(own.sum()) * len(continuation) / int(mask.sum()))
    return float(np.mean(estimates))


def measure(case: Case, repetitions: int, steadiness: Steadiness) -> dict[str, Any]:
    """Samples a second of both, and their ratio.

    Raises:
        RuntimeError: the two disagree.
    """
    directory, load_format = find_model(MODEL)
    model = load_denoiser(directory, dtype="float32", load_format=load_format)
    assert isinstance(model, TransformerDenoiser), "a checkpoint"
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        drawn = random.integers(model.config.vocab_size - 1, size=count)
        return [int(i) + (i >= model.mask_id) for i in drawn]

    prompt, continuations = ids(PROMPT_LEN), [ids(length) for length in case.lens]
    rates: list[tuple[float, float]] = []
    with LLM(directory, dtype="float32", load_format=load_format) as llm:
        llm.score([prompt], continuations[:1], num_samples=2, use_tqdm=False)  # warms up
        for _ in range(repetitions):
            started = time.perf_counter()
            scores: list[Score] = llm.score(
                [prompt], continuations, num_samples=case.num_samples, use_tqdm=False
            )
            middle = time.perf_counter()
            plain = [plain_loop(model, prompt, own, case.num_samples) for own in continuations]
            ended = time.perf_counter()
            for score, logprob in zip(scores, plain, strict=True):
                if abs(score.logprob - logprob) > 1e-3 * abs(logprob):
                    raise RuntimeError(f"remask says {score.logprob}, the plain loop {logprob}")
            count = case.num_samples * len(continuations)
            rates.append((count / (ended - middle), count / (middle - started)))
            steadiness.look()
    return {
        **case._asdict(),
        "model": MODEL,
        "prompt_len": PROMPT_LEN,
        "num_masks": [len(draw_masks(length, case.num_samples, 0).masks) for length in case.lens],
        **repeated.rate_figures(rates),
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A case's line of the table."""
    return [
        result["name"],
        ", ".join(map(str, result["lens"])),
        str(result["num_samples"]),
        *repeated.rate_cells(result),
    ]


def main() -> None:
    def every(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
        return [measure(case, repetitions, steadiness) for case in CASES]

    repeated.run(__doc__, HEADER, cells, every, repetitions=3)


if __name__ == "__main__":
    main()
