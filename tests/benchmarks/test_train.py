"""The trainer: it learns, goes on after an interruption as if there had been none, and its export loads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from remask import LLM
from remask.benchmarks.tiny.tasks import SUDOKU_4X4
from remask.benchmarks.tiny.train import MASK_ID, Bucket, Trainer, draw_batch


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Without the compiler, which takes minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def trainer() -> Trainer:
    return Trainer(argparse.Namespace(seed=3, init=None, lr=0.02, steps=100, warmup=2, decay=10, batch=8))


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, first = trainer(), trainer()
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save_state(tmp_path / "state.pt")
    resumed = trainer()
    resumed.load_state(tmp_path / "state.pt")
    losses = [resumed.step()["loss"] for _ in range(2)]
    assert resumed.step_done == whole.step_done == 4
    assert losses[0] != losses[1]
    for name, master in whole.masters.items():
        assert torch.equal(master, resumed.masters[name]), name


def test_training_lowers_the_loss_and_the_export_loads(tmp_path: Path) -> None:
    run = trainer()
    losses = [float(str(run.step()["loss"])) for _ in range(12)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2])
    run.export(tmp_path)
    with LLM(tmp_path, device="cpu") as llm:
        (output,) = llm.generate("12..=", {"max_tokens": 8})
    assert output.outputs[0].nfe >= 1


def test_masking_ratios_are_stratified_and_weighted_by_their_inverse() -> None:
    ids, target, weights = draw_batch(np.random.default_rng(0), Bucket(SUDOKU_4X4, 20, 1.0), 40)
    masked = ids[:, -20:] == MASK_ID
    num_masked = masked.sum(1)
    assert sorted(num_masked.tolist()) == sorted(list(range(1, 21)) * 2)
    torch.testing.assert_close(weights, masked / num_masked.unsqueeze(1) / 40)
    assert torch.equal(ids[:, -20:][~masked], target[~masked])
