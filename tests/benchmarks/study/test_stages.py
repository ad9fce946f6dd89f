"""The stages beside the samples: the exact verifier and the exact posterior."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from step_cases import logits_of

from remask import InvalidRequest
from remask.benchmarks.study import agreement, posterior
from remask.benchmarks.study.grid import Arm, Cell, Grid, Posterior, cells, tasks_of
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

ARMS = {"plain": Arm("capped_threshold:{t}"), "exact": Arm("capped_threshold:{t}", "oracle_loo:0.9")}
POSTERIOR = Posterior(
    arms=("plain", "exact"),
    block_lengths=(5, "whole"),
    temperatures=(1.0,),
    thresholds=(0.5,),
    num_samples=1100,
)
PROMPT = [33, 11, 12, 14]


def exact_cell(t2: float, **fields: Any) -> Cell:
    own: dict[str, Any] = {
        "task": "t", "arm": "exact", "unmask": "capped_threshold:0.3", "remask": f"oracle_loo:{t2}",
        "threshold": 0.3, "block_length": None, "temperature": 0.0, "rank": "proposal", "seed": 0,
        "num_prompts": 1, "n": 1, "canvas_len": 16,
    }  # fmt: skip
    return Cell(**{**own, **fields})


@torch.inference_mode()
@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny"])
def test_leave_one_out_probabilities_are_those_of_copies_without_the_token(checkpoint: str) -> None:
    model = load_denoiser(GOLDEN / checkpoint, dtype="float32", device="cpu")
    ids = np.array([*PROMPT, 7, model.mask_id, 9, model.mask_id, 5])
    found = agreement.leave_one_out(model, ids, np.array([4, 6]))
    for position, value in zip((4, 6), found, strict=True):
        copy = ids.copy()
        copy[position] = model.mask_id
        exact = agreement.leave_one_out(model, copy, np.array([position]))
        assert float(exact[0]) != pytest.approx(float(value)), "that of the mask itself is another number"
        logits = logits_of(model, copy)[position - model.config.shift]
        assert float(value) == pytest.approx(float(logits.double().softmax(-1)[ids[position]]), rel=1e-4)


@pytest.mark.parametrize(("t2", "share"), [(1e-9, 0.0), (1.0, 1.0)])
def test_decisions_are_counted_once_for_each_committed_token_and_step(
    golden_model: TransformerDenoiser, t2: float, share: float
) -> None:
    row: dict[str, Any] = agreement._compared(golden_model, exact_cell(t2), PROMPT)
    assert row["num_decisions"] > 10
    assert row["num_doubted_by_both"] == share * row["num_decisions"]
    assert row["num_doubted_by_shadows"] == row["num_doubted_exactly"] == 0
    assert row["sum_of_distances"] > 0


def test_greedy_cells_of_the_exact_verifier_are_replayed_once(golden_model: TransformerDenoiser) -> None:
    others = [exact_cell(0.9, temperature=1.0), exact_cell(0.9, remask=None)]
    wanted = agreement.exact_cells([exact_cell(0.9), *others])
    assert wanted == [exact_cell(0.9)]
    done: list[Any] = []
    saved: list[int] = []
    seen: list[tuple[int, int]] = []

    def run() -> None:
        agreement.measure(
            golden_model,
            wanted,
            lambda _: [PROMPT, PROMPT[:2]],
            done,
            lambda rows: saved.append(len(rows)),
            lambda *own: seen.append(own),
        )

    run()
    run()
    assert (saved, seen, [row["prompt"] for row in done]) == ([2], [(1, 1), (1, 1)], [0, 1])


def test_an_interrupted_posterior_goes_on_where_it_was() -> None:
    grid = Grid(arms=ARMS, grid=(), posterior=POSTERIOR)
    wanted = posterior.settings(grid)
    assert [(row["arm"], row["block_length"]) for row in wanted] == [
        ("plain", 5), ("plain", None), ("exact", 5), ("exact", None),
    ]  # fmt: skip
    whole: list[Any] = []
    posterior.measure(wanted, whole, lambda rows: None, lambda *_: None)
    assert {row["nfe"] for row in whole[:2]} == {2.0}, "half of the chain's tokens are above the threshold"
    assert all(row["distance"] > 0.3 for row in whole)

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    cut: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        posterior.measure(wanted, cut, lambda rows: None, interrupt)
    assert len(cut) == 2
    posterior.measure(wanted, cut, lambda rows: None, lambda *_: None)
    assert cut == whole


def test_a_posterior_of_an_invalid_arm_is_refused_by_name() -> None:
    grid = Grid(arms={**ARMS, "odd": Arm("capped_threshold:0.5", "winno")}, grid=(), posterior=Posterior(
        arms=("odd",), block_lengths=(5,), temperatures=(1.0,)
    ))  # fmt: skip
    with pytest.raises(InvalidRequest, match="posterior, arm 'odd'"):
        posterior.settings(grid)


def test_grids_without_these_stages_have_none() -> None:
    grid = Grid(arms=ARMS, grid=())
    assert posterior.settings(grid) == []
    assert agreement.exact_cells(cells(grid, tasks_of(grid))) == []
    assert "sudoku4x4_open" in tasks_of(grid)
