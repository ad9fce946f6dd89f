"""The settings that `remask study tune` chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from remask import SamplingParams
from remask.benchmarks.study.grid import WHOLE

CAPPED = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
FACTORS = (0.5, 1.0, 2.0)
ENTROPY_BOUNDS = (0.1, 0.5, 2.0)
TOKENS_A_STEP = (1, 2, 4, 8)
REMASKING = ("wino:0.9", "low_prob:0.5")
FIRST_BLOCK = 8
MAX_BLOCKS = 3  # lengths beside the whole canvas


class Candidate(NamedTuple):
    """Policies and a block length; None: the whole canvas."""

    unmask: str
    remask: str | None
    block_length: int | None

    def __str__(self) -> str:
        policies = self.unmask if self.remask is None else f"{self.unmask} + {self.remask}"
        return f"{policies}, block {self.block}"

    @property
    def block(self) -> int | str:
        """The block length as a preset has it."""
        return WHOLE if self.block_length is None else self.block_length

    def params(self, canvas_len: int) -> SamplingParams:
        """Parameters for a canvas."""
        return SamplingParams(
            max_tokens=canvas_len,
            block_length=min(self.block_length or canvas_len, canvas_len),
            unmask=self.unmask,
            remask=self.remask,
        )


def candidates(canvas_len: int) -> list[Candidate]:
    """All settings for canvases of up to `canvas_len` tokens."""
    return list(dict.fromkeys(_candidates(canvas_len)))


def block_lengths(canvas_len: int) -> list[int | None]:
    """Powers of two from `FIRST_BLOCK` on that are shorter than the canvas, at most `MAX_BLOCKS` of them,
    evenly chosen, and the whole canvas."""
    every = [1 << n for n in range(3, 31) if FIRST_BLOCK <= 1 << n < canvas_len]
    if len(every) > MAX_BLOCKS:
        last = len(every) - 1
        every = [every[round(i * last / (MAX_BLOCKS - 1))] for i in range(MAX_BLOCKS)]
    return [*every, None]


def _candidates(canvas_len: int) -> Iterator[Candidate]:
    for block_length in block_lengths(canvas_len):
        for t in CAPPED:
            for remask in (None, *REMASKING):
                yield Candidate(f"capped_threshold:{t}", remask, block_length)
        for t in THRESHOLDS:
            yield Candidate(f"threshold:{t}", None, block_length)
        for f in FACTORS:
            yield Candidate(f"factor:{f}", None, block_length)
        for g in ENTROPY_BOUNDS:
            yield Candidate(f"entropy_bound:{g}", None, block_length)
        num_blocks = 1 if block_length is None else -(-canvas_len // block_length)
        for tokens in TOKENS_A_STEP:
            if (num_steps := -(-canvas_len // tokens)) >= num_blocks:
                yield Candidate(f"schedule:steps={num_steps}", None, block_length)
