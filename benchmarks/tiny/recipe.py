"""The training data of the tiny model and its twin, in order: stages of batches of one task and canvas size.

Stage 1 is the first edition's training. Stage 2 adds addition and free text and repeats sudoku, so that
nothing is forgotten. Addition is a third of its batches: it stays on a plateau for some hundred of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from remask.benchmarks.tiny.tasks import ADDITION, SUDOKU_4X4, SUDOKU_6X6, Task
from remask.benchmarks.tiny.text import TEXT


@dataclass(frozen=True)
class Bucket:
    """Batches of one task and canvas size; equal lengths need no padding, EOS fills up the answer."""

    task: Task
    canvas: int
    share: float


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps: `warmup` up to the learning rate, the last `decay` linearly down to zero."""

    steps: int
    lr: float
    warmup: int
    decay: int
    buckets: tuple[Bucket, ...]

    def lr_scale(self, step: int) -> float:
        """The factor on the learning rate at a step of the stage, from 0."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / self.decay))


RECIPE = (
    Stage(
        steps=2200,
        lr=0.02,
        warmup=100,
        decay=600,
        buckets=(
            Bucket(SUDOKU_6X6, 36, 0.22),
            Bucket(SUDOKU_6X6, 40, 0.26),
            Bucket(SUDOKU_6X6, 64, 0.07),
            Bucket(SUDOKU_6X6, 128, 0.07),
            Bucket(SUDOKU_4X4, 16, 0.12),
            Bucket(SUDOKU_4X4, 24, 0.16),
            Bucket(SUDOKU_4X4, 64, 0.05),
            Bucket(SUDOKU_4X4, 128, 0.05),
        ),
    ),
    Stage(
        steps=2000,
        lr=0.015,
        warmup=50,
        decay=800,
        buckets=(
            Bucket(SUDOKU_6X6, 36, 0.05),
            Bucket(SUDOKU_6X6, 40, 0.22),
            Bucket(SUDOKU_6X6, 64, 0.03),
            Bucket(SUDOKU_6X6, 128, 0.01),
            Bucket(SUDOKU_4X4, 16, 0.03),
            Bucket(SUDOKU_4X4, 24, 0.10),
            Bucket(SUDOKU_4X4, 64, 0.02),
            Bucket(ADDITION, 8, 0.32),
            Bucket(ADDITION, 32, 0.03),
            Bucket(TEXT, 64, 0.17),
            Bucket(TEXT, 128, 0.02),
        ),
    ),
)
