"""Equal sequences of a pack are computed once, and every canvas has the numbers that it has alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from step_cases import after, canvas, finish, step_inputs

from remask import OracleLoo, SamplingParams, Schedule, Wino
from remask.scheduler.canvas import Canvas, CanvasState
from remask.workers.burst.state import BurstState
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import HeadQuery, PackedRows
from remask.workers.rows.repeats import without_repeats
from remask.workers.step import pack, plan_packs

PLAIN = {"max_tokens": 12, "block_length": 12, "unmask": Schedule()}
OTHER = [33, 11, 12, 15]


def packed(model: TransformerDenoiser, canvases: list[Canvas], states: list[CanvasState]):
    state = BurstState([c.spec for c in canvases], states)
    (plan,) = plan_packs(state, model, 1 << 20)
    return pack(plan, step_inputs(state, model.mask_id), model)


def same_tokens(model: TransformerDenoiser, policies: list[dict[str, Any]], num_steps: int):
    """Canvases with other policies that hold the same tokens, and two that hold others."""
    canvases = [canvas(SamplingParams(**{**PLAIN, **policy})) for policy in policies]
    held = after(model, canvas(SamplingParams(**PLAIN)), num_steps) if num_steps else canvases[0].state
    states = [msgspec.structs.replace(own.state, tokens=held.tokens) for own in canvases]
    others = [
        canvas(SamplingParams(**PLAIN), OTHER),
        canvas(SamplingParams(**{**PLAIN, "max_tokens": 9, "block_length": 9})),
    ]
    return [*canvases, *others], [*states, *(own.state for own in others)]


@torch.inference_mode()
@pytest.mark.parametrize("num_steps", [0, 5])
def test_equal_sequences_share_rows_and_no_number_changes(
    golden_model: TransformerDenoiser, num_steps: int
) -> None:
    policies: list[dict[str, Any]] = [
        {},
        {"remask": Wino()},
        {"unmask": "threshold:0.5", "temperature": 1.0},
        {"remask": Wino(0.5, ban_old=True)},
        {"remask": Wino(tile="self")},
        {"remask": OracleLoo()},
        {"cfg_scale": 1.0},
        {"remask": OracleLoo(0.5)},
        {"cfg_scale": 2.0},
    ]
    canvases, states = same_tokens(golden_model, policies, num_steps)
    rows, query = packed(golden_model, canvases, states)
    shared = without_repeats(rows)
    # One sequence of prompt and canvas, two of others, one in which the prompt is hidden, a copy without each
    # committed token; shadow rows of two kinds, all slots or committed ones.
    expected = 16 + 16 + 13 + 16 + num_steps * 16 + (12 + num_steps if num_steps else 0)
    assert len(shared.ids_T) == len(shared.positions_T) == expected < len(rows.ids_T)
    assert torch.equal(shared.ids_T[shared.candidates_H], rows.ids_T[rows.candidates_H])
    assert torch.equal(shared.positions_T[shared.candidates_H], rows.positions_T[rows.candidates_H])
    found, before = (golden_model.statistics(own, query) for own in (shared, rows))
    assert torch.equal(found.ids, before.ids)
    torch.testing.assert_close(found.reals, before.reals, rtol=1e-4, atol=1e-4)


def test_a_pack_without_repeats_stays_as_it_is(golden_model: TransformerDenoiser) -> None:
    canvases = [canvas(SamplingParams(**PLAIN)), canvas(SamplingParams(**PLAIN), OTHER)]
    rows, _ = packed(golden_model, canvases, [own.state for own in canvases])
    assert without_repeats(rows) is rows


def test_only_canvases_that_may_become_equal_are_compared(golden_model: TransformerDenoiser) -> None:
    def compared(*canvases: Canvas) -> bool:
        (plan,) = plan_packs(
            BurstState([c.spec for c in canvases], [c.state for c in canvases]), golden_model, 1 << 20
        )
        return plan.may_repeat

    one, other = canvas(SamplingParams(**PLAIN)), canvas(SamplingParams(**PLAIN), OTHER)
    longer = canvas(SamplingParams(**{**PLAIN, "max_tokens": 13}))
    assert not compared(one)
    assert not compared(one, other, longer)
    assert compared(one, other, canvas(SamplingParams(**PLAIN), seed=1))
    guided = canvas(SamplingParams(**PLAIN, cfg_scale=1.0), OTHER)
    assert compared(one, guided)


def test_a_step_computes_the_samples_of_a_prompt_once_while_they_are_equal(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    statistics = TransformerDenoiser.statistics

    def noted(self: TransformerDenoiser, rows: PackedRows, query: HeadQuery) -> Any:
        seen.append(len(rows.ids_T))
        return statistics(self, rows, query)

    monkeypatch.setattr(TransformerDenoiser, "statistics", noted)
    params = SamplingParams(**{**PLAIN, "temperature": 2.0, "rank": "top"})
    finish(golden_model, [canvas(params, seed=seed) for seed in range(6)])
    assert seen[0] == 16
    assert seen[-1] == 6 * 16
