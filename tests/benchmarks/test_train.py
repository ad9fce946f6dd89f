"""The trainer: it learns, goes on after an interruption as if there had been none, and its exports load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remask import LLM
from remask.benchmarks.tiny.objectives import OBJECTIVES, encode
from remask.benchmarks.tiny.recipe import RECIPE, Stage
from remask.benchmarks.tiny.tasks import ADDITION, SUDOKU_4X4
from remask.benchmarks.tiny.text import TEXT
from remask.benchmarks.tiny.tokenizer import EOS_ID, MASK_ID
from remask.benchmarks.tiny.train import Trainer
from remask.workers.models.cpu import multiplies

has_bfloat16 = multiplies(torch.bfloat16, torch.device("cpu"))
trains_here = pytest.mark.skipif(not has_bfloat16, reason="training multiplies bf16, and this CPU cannot")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Without the compiler, which takes minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def trainer(objective: str = "masked", **changes: object) -> Trainer:
    args = {"objective": objective, "seed": 3, "init": None, "steps_done": 0, "batch": 8, **changes}
    return Trainer(argparse.Namespace(**args))


@pytest.mark.slow
@trains_here
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(objective: str, tmp_path: Path) -> None:
    whole, first = trainer(objective), trainer(objective)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save_state(tmp_path / "state.pt")
    resumed = trainer(objective)
    resumed.load_state(tmp_path / "state.pt")
    losses = [resumed.step()["loss"] for _ in range(2)]
    assert resumed.step_done == whole.step_done == 4
    assert losses[0] != losses[1]
    for name, master in whole.masters.items():
        assert torch.equal(master, resumed.masters[name]), name


@pytest.mark.slow
@trains_here
def test_training_lowers_the_loss_and_the_export_loads(tmp_path: Path) -> None:
    run = trainer()
    losses = [float(str(run.step()["loss"])) for _ in range(30)]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:3])
    run.export(tmp_path)
    with LLM(tmp_path, device="cpu") as llm:
        (output,) = llm.generate("12..=", {"max_tokens": 8})
    assert output.outputs[0].nfe >= 1


@trains_here
def test_a_checkpoint_goes_on_where_it_was_left(tmp_path: Path) -> None:
    first = trainer()
    first.step()
    first.export(tmp_path)
    going_on = trainer(init=tmp_path, steps_done=1)
    assert all(
        torch.equal(p, q) for p, q in zip(first.model.parameters(), going_on.model.parameters(), strict=True)
    )
    assert going_on.step()["step"] == 2


@trains_here
def test_the_twin_is_what_transformers_loads(tmp_path: Path) -> None:
    run = trainer("causal")
    run.step()
    run.export(tmp_path)
    prompts, answers = SUDOKU_4X4.sample(np.random.default_rng(0), 3)
    ids = encode([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(prompts)["input_ids"] == encode(prompts).tolist()
    with torch.no_grad():
        expected = run.model.float()(ids, ids.shape[1])
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-4)


@trains_here
def test_both_objectives_see_the_same_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list] = {}
    for name, objective in OBJECTIVES.items():
        run, drawn = trainer(name), seen.setdefault(name, [])
        batch = objective.batch

        def spy(rng, problems, canvas, batch=batch, drawn=drawn):
            drawn.append(problems)
            return batch(rng, problems, canvas)

        monkeypatch.setattr(type(objective), "batch", staticmethod(spy))
        for _ in range(3):
            run.step()
    assert seen["masked"] == seen["causal"]
    assert len(seen["masked"]) == 3


def test_masking_ratios_are_stratified_and_weighted_by_their_inverse() -> None:
    rng = np.random.default_rng(0)
    ids, target, weights = OBJECTIVES["masked"].batch(rng, SUDOKU_4X4.sample(rng, 40), 20)
    masked = ids[:, -20:] == MASK_ID
    num_masked = masked.sum(1)
    assert sorted(num_masked.tolist()) == sorted(list(range(1, 21)) * 2)
    torch.testing.assert_close(weights, masked / num_masked.unsqueeze(1) / 40)
    assert torch.equal(ids[:, -20:][~masked], target[~masked])


def test_the_twin_learns_the_answer_and_its_end_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    problems = TEXT.sample(rng, 40)
    ids, target, weights = OBJECTIVES["causal"].batch(rng, problems, 64)
    for prompt, answer, row, asked, weight in zip(*problems, ids, target, weights, strict=True):
        expected = [*encode([answer])[0].tolist(), EOS_ID]
        assert asked[: len(expected)].tolist() == expected
        assert (weight > 0).sum() == len(expected)
        assert torch.equal(row, torch.cat([encode([prompt])[0], asked[:-1]]))
    assert weights.sum() == pytest.approx(1)
    ids, target, _ = OBJECTIVES["causal"].batch(rng, ADDITION.sample(rng, 4), 32)
    assert target.shape == (4, 5), "the canvas behind the end is left out"
    assert ids.shape == (4, 8 + 4)


def test_a_stage_warms_up_and_ends_at_rest() -> None:
    stage = Stage(steps=100, lr=1.0, warmup=10, decay=50, buckets=RECIPE[0].buckets)
    assert [stage.lr_scale(step) for step in (0, 9, 50, 75, 99)] == pytest.approx([0.1, 1, 1, 0.5, 0.02])


def test_stages_follow_each_other() -> None:
    run = trainer(steps_done=RECIPE[0].steps)
    assert run.stage() == (RECIPE[1], 0)
    assert trainer(steps_done=RECIPE[0].steps - 1).stage() == (RECIPE[0], RECIPE[0].steps - 1)
    with pytest.raises(ValueError, match="recipe ends"):
        trainer(steps_done=sum(stage.steps for stage in RECIPE)).stage()
