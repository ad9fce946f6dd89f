"""The rows of a step: which there are, what they see, and what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from step_cases import after, canvas, step_inputs

from remask import (
    CappedThreshold,
    LowProb,
    OracleLoo,
    SamplingParams,
    Schedule,
    Wino,
)
from remask.scheduler.canvas import Canvas, CanvasState
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.burst.state import BurstState
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.rows.pack import HeadQuery, PackedRows
from remask.workers.step import pack, plan_packs

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"


def packed(
    model: TransformerDenoiser, canvases: list[Canvas], states: list[CanvasState]
) -> tuple[PackedRows, HeadQuery]:
    state = BurstState([c.spec for c in canvases], states)
    (plan,) = plan_packs(state, model, model.pack_rows)
    return pack(plan, step_inputs(state, model.mask_id), model)


@torch.inference_mode()
def test_shadow_rows_change_no_logit_of_a_main_row(golden_model: TransformerDenoiser) -> None:
    params = {"max_tokens": 24, "block_length": 24, "unmask": CappedThreshold(0.3)}
    plain, verifying = (canvas(SamplingParams(**params, remask=remask)) for remask in (None, Wino()))
    state = after(golden_model, plain, 2)
    without, _ = packed(golden_model, [plain], [state])
    with_shadows, _ = packed(
        golden_model, [verifying], [msgspec.structs.replace(state, memory=verifying.state.memory)]
    )
    assert len(with_shadows.ids_T) == len(without.ids_T) + 24
    a, b = (golden_model.model(rows, golden_model.attention) for rows in (without, with_shadows))
    assert len(b) > len(a) > 0
    torch.testing.assert_close(b[: len(a)], a, rtol=1e-4, atol=1e-4)


def test_packs_hold_no_padding_whatever_the_block_lengths(golden_model: TransformerDenoiser) -> None:
    long = canvas(SamplingParams(max_tokens=64, block_length=64))
    short = canvas(SamplingParams(max_tokens=20, block_length=8, unmask=Schedule(), remask=Wino()))
    rows, query = packed(golden_model, [long, short], [long.state, after(golden_model, short, 3)])
    assert len(rows.ids_T) == long.num_rows + short.num_rows == (4 + 64) + (4 + 20 + 8)
    assert len(query.given) == len(rows.candidates_H) == 64 + 5 + 3
    assert rows.num_main_slots == 64 + 5


def test_candidates_are_masked_slots_and_shadow_rows_of_committed_ones(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    state = after(golden_model, own, 11)  # three of the second block
    rows, query = packed(golden_model, [own], [state])
    masked = rows.ids_T[12:20] == 0
    assert int(masked.sum()) == 5
    assert rows.candidates_H.tolist() == [
        *(12 + masked.nonzero().squeeze(1)).tolist(),
        *(20 + (~masked).nonzero().squeeze(1)).tolist(),
    ]
    assert query.given[5:].tolist() == rows.ids_T[12:20][~masked].tolist()
    (whole,), (read,) = rows.layout.shadows, rows.candidate_layout.shadows
    assert (whole.queries, whole.keys, read.queries, read.keys) == ((0, 8), (0, 8), (0, 3), (0, 8))
    assert torch.equal(read.mask, whole.mask[~masked])


def test_there_are_no_shadow_rows_while_nothing_of_the_block_is_committed(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    other = canvas(SamplingParams(max_tokens=16, block_length=4, unmask=Schedule(), remask=Wino()))
    rows, _ = packed(golden_model, [own, other], [after(golden_model, own, 8), after(golden_model, other, 1)])
    assert len(rows.ids_T) == 2 * (4 + 16) + 4
    assert [shadow.sequence for shadow in rows.layout.shadows] == [1]


def test_a_shadow_row_stands_at_its_slot_and_sees_all_but_it(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=12, block_length=5, unmask=Schedule(), remask=Wino()))
    state = after(golden_model, own, 11)  # the last block is shorter: two slots, one of them committed
    assert state.block == 2
    rows, _ = packed(golden_model, [own], [state])
    assert rows.ids_T[16:].tolist() == [0, 0]
    assert rows.positions_T[16:].tolist() == [14, 15]
    mask = rows.layout.shadows[0].mask
    for j, hole in enumerate((14, 15)):
        assert (~mask[j]).nonzero().squeeze(1).tolist() == [hole]


@torch.inference_mode()
def test_a_policy_that_asks_for_committed_rows_gets_their_own_probabilities(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=LowProb()))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    states = [after(golden_model, own, 11), after(golden_model, other, 3)]
    rows, query = packed(golden_model, [own, other], states)
    assert rows.candidates_H[:8].tolist() == list(range(12, 20)), "the whole block, masked or not"
    assert len(rows.candidates_H) == 8 + 5 + 3
    found = golden_model.statistics(rows, query)
    hidden = golden_model.model(rows, golden_model.attention)
    p = golden_model.model.logits(hidden[:8]).float().softmax(-1)
    tokens = torch.from_numpy(states[0].token_array()[12:20].astype(np.int64))
    torch.testing.assert_close(found.log_given.exp()[:8], p.gather(1, tokens.unsqueeze(1)).squeeze(1))


def test_shadow_rows_that_see_only_themselves_stand_for_committed_slots_alone(
    golden_model: TransformerDenoiser,
) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino(tile="self")))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    rows, _ = packed(golden_model, [own, other], [after(golden_model, c, 3) for c in (own, other)])
    assert len(rows.ids_T) == 2 * 20 + 3 + 8
    small, whole = rows.layout.shadows
    assert torch.equal(small.mask[:, 20:], torch.eye(3, dtype=torch.bool))
    assert whole.mask[:, 20:].all()
    assert (small.mask[:, :20].sum(1) == 19).all()


@torch.inference_mode()
def test_in_one_layer_a_lone_shadow_row_is_the_exact_leave_one_out(tmp_path: Path) -> None:
    config = json.loads((MODELS / "llada-124m" / "config.json").read_text())
    config |= {"d_model": 64, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 96}
    config |= {"vocab_size": 200, "embedding_size": 200, "mask_token_id": 0, "eos_token_id": 1}
    config.pop("eot_token_id", None)
    config.pop("pad_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_denoiser(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    model.model.head.mul_(0.1)  # so that probabilities are neither 0 nor 1
    errors = {}
    for tile in ("self", "all"):
        own = canvas(
            SamplingParams(max_tokens=12, block_length=8, unmask=Schedule(), remask=Wino(0, tile=tile))
        )
        state = after(model, own, 5)
        rows, query = packed(model, [own], [state])
        found = model.statistics(rows, query)
        tokens = torch.from_numpy(state.token_array().astype(np.int64))
        errors[tile] = 0.0
        committed = [slot for slot in range(8) if tokens[4 + slot] != 0]
        for place, slot in enumerate(committed, start=rows.num_main_slots):
            hole = tokens.clone()
            hole[4 + slot] = 0
            every, bounds = torch.arange(16), (0, 16)
            layout = VarlenLayout(bounds, bounds, ())
            alone = PackedRows(hole, every, layout, every, layout, every, 16)
            p = model.model.logits(model.model(alone, model.attention))[4 + slot].softmax(-1)
            difference = float(found.log_given.exp()[place] - p[tokens[4 + slot]])
            errors[tile] = max(errors[tile], abs(difference))
        assert len(committed) == 5
    assert errors["self"] < 1e-5
    assert errors["all"] > 1e-3, "there is a difference to see"


@torch.inference_mode()
def test_the_oracle_asks_once_for_each_committed_token_without_it(golden_model: TransformerDenoiser) -> None:
    own = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=OracleLoo()))
    guided = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), cfg_scale=1.0))
    other = canvas(SamplingParams(max_tokens=16, block_length=8, unmask=Schedule(), remask=Wino()))
    canvases = [guided, own, other]
    states = [after(golden_model, each, 11) for each in canvases]
    assert own.num_rows == 20 * 9
    rows, query = packed(golden_model, canvases, states)
    assert len(rows.ids_T) == 40 + 20 + 20 + 3 * 20 + 8
    assert len(rows.slots_N) == 5 + 5 + 5 + 3 + 3
    found = golden_model.statistics(rows, query)
    tokens = torch.from_numpy(states[1].token_array().astype(np.int64))
    committed = [slot for slot in range(12, 20) if tokens[slot] != 0]
    assert len(committed) == 3
    every, bounds = torch.arange(20), (0, 20)
    layout = VarlenLayout(bounds, bounds, ())
    for place, slot in enumerate(committed, start=15):
        hole = tokens.clone()
        hole[slot] = 0
        alone = PackedRows(hole, every, layout, every, layout, every, 20)
        p = golden_model.model.logits(golden_model.model(alone, golden_model.attention))[slot].softmax(-1)
        assert float(found.log_given.exp()[place]) == pytest.approx(float(p[tokens[slot]]), rel=1e-4)
