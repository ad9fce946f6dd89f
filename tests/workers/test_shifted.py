"""Models with shifted logits: row i - 1 predicts position i, for candidates, copies and shadow rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from step_cases import finish, logits_of, step_inputs
from torch import Tensor

from remask import LLM, SamplingParams
from remask.scheduler.canvas import TOKEN, Canvas, new_canvas
from remask.scheduler.params import resolve
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.burst.state import BurstState
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.step import pack, plan_packs

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "dream-tiny"
MASK, PROMPT = 151, [99, 12, 40]
POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.5"},
    {"unmask": "schedule:steps=6,score=margin", "cfg_scale": 1.0},
    {"unmask": "dream:steps=7,alg=entropy", "temperature": 0.7},
    {"unmask": "bernoulli", "temperature": 1.0, "top_k": 5},
    {"unmask": "capped_threshold:0.3", "remask": "wino:0.95"},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95,tile=self,ban_old=true"},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.95"},
    {"unmask": "threshold:0.3", "remask": "low_prob:0.6,max_times=2,post_steps=3"},
    {"remask": "saber:3,2"},
    {"remask": "rcr", "unmask": "schedule:steps=6"},
]

UNEDITED = [own for own in POLICIES if "cfg_scale" not in own and "ban_old" not in own.get("remask", "")]


@pytest.fixture(scope="module")
def dream() -> TransformerDenoiser:
    return load_denoiser(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> TransformerDenoiser:
    folder = tmp_path_factory.mktemp("dream")
    config = json.loads((CHECKPOINT / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return load_denoiser(folder, dtype="float32", device="cpu", load_format="dummy")


def canvas(fields: dict[str, Any], canvas_len: int = 12, block_len: int = 6, seed: int = 5) -> Canvas:
    block = canvas_len if "dream" in fields.get("unmask", "") else block_len
    params = resolve(SamplingParams(max_tokens=canvas_len, block_length=block, **fields))
    return new_canvas("r", 0, PROMPT, params, seed=seed, sample=0, mask_id=MASK, stop_ids=[143], shift=1)


def half_filled(fields: dict[str, Any], committed: list[int]) -> Canvas:
    """A canvas of one block with tokens in some slots."""
    own = canvas(fields, 8, 8)
    tokens = own.state.token_array().copy()
    tokens[[len(PROMPT) + slot for slot in committed]] = [30 + 3 * slot for slot in committed]
    own.state = msgspec.structs.replace(own.state, tokens=tokens.astype(TOKEN).tobytes())
    return own


def asked(model: TransformerDenoiser, own: Canvas) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Log-probabilities of the most probable token at masked slots, and of the tokens in verified ones."""
    state = BurstState([own.spec], [own.state])
    (plan,) = plan_packs(state, model, 1 << 30)
    rows, query = pack(plan, step_inputs(state, MASK), model)
    found, slots = model.statistics(rows, query), rows.slots_N.tolist()
    live = [True] * len(slots) if query.live is None else query.live.tolist()
    main, verified = {}, {}
    for place, slot in enumerate(slots):
        if live[place] and place < rows.num_main_slots:
            main[slot] = found.log_top[place]
        elif live[place]:
            verified[slot] = found.log_given[place]
    return main, verified


def left_out(model: TransformerDenoiser, own: Canvas) -> dict[int, Tensor]:
    """Of each committed slot the log-probability of its token without it."""
    tokens, found = own.state.token_array(), {}
    for slot in range(8):
        place = len(PROMPT) + slot
        if tokens[place] != MASK:
            without = tokens.copy()
            without[place] = MASK
            logprobs = logits_of(model, without)[place - 1].log_softmax(-1)
            found[slot] = logprobs[int(tokens[place])]
    return found


def close(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    assert one.keys() == other.keys()
    for slot, value in one.items():
        torch.testing.assert_close(value, other[slot], rtol=1e-4, atol=1e-5)


COMMITTED = [[0, 1, 2, 5], [0], [7, 3], [0, 1, 2, 3, 4, 5, 6]]
WINO = {"unmask": "capped_threshold:0.3", "remask": "wino:0.95"}


def static(model: TransformerDenoiser) -> TransformerDenoiser:
    return TransformerDenoiser(model.model, SdpaAttention(), pack_rows=1 << 30, static_shapes=True)


@torch.inference_mode()
@pytest.mark.parametrize("committed", COMMITTED, ids=str)
@pytest.mark.parametrize("is_static", [False, True], ids=["compact", "static"])
def test_shadow_rows_are_the_exact_leave_one_out_of_one_layer(
    one_layer: TransformerDenoiser, committed: list[int], is_static: bool
) -> None:
    model = static(one_layer) if is_static else one_layer
    own = half_filled(WINO, committed)
    main, verified = asked(model, own)
    close(verified, left_out(one_layer, own))
    close(main, asked(one_layer, half_filled({"unmask": "capped_threshold:0.3"}, committed))[0])


@torch.inference_mode()
@pytest.mark.parametrize("committed", COMMITTED, ids=str)
def test_copies_are_the_exact_leave_one_out_of_any_layers(
    dream: TransformerDenoiser, committed: list[int]
) -> None:
    own = half_filled({"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.95"}, committed)
    close(asked(dream, own)[1], left_out(dream, own))


@torch.inference_mode()
def test_verifying_changes_no_logit_of_the_main_rows(dream: TransformerDenoiser) -> None:
    plain = asked(dream, half_filled({"unmask": "capped_threshold:0.3"}, [0, 2, 3]))[0]
    for remask in ("wino:0.95", "wino:t2=0.95,tile=self", "oracle_loo:0.95"):
        close(asked(dream, half_filled({**WINO, "remask": remask}, [0, 2, 3]))[0], plain)


def test_rows_are_counted_as_they_are_needed() -> None:
    own = canvas(WINO)
    assert own.spec.num_rows(own.state.sequence_len) == len(PROMPT) + 12 + 2 * 6
    state = BurstState([own.spec], [own.state])
    assert int(state.rows_per_slot[0]) == 2


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_every_policy_writes_the_same_alone_packed_and_in_static_shapes(
    dream: TransformerDenoiser, fields: dict[str, Any]
) -> None:
    def canvases() -> list[Canvas]:
        return [canvas(fields), canvas({"unmask": "threshold:0.7"}, 9, 4), canvas(fields, 7, 7, seed=6)]

    alone = [finish(dream, [own])[0] for own in canvases()]
    for states in (finish(dream, canvases(), 2), finish(static(dream), canvases(), 3)):
        for one, other in zip(states, alone, strict=True):
            assert (one.tokens, one.num_forwards) == (other.tokens, other.num_forwards)
            assert one.num_query_rows == other.num_query_rows


@torch.inference_mode()
@pytest.mark.parametrize("fields", UNEDITED, ids=str)
def test_a_commit_is_decided_by_the_row_before_its_slot(
    dream: TransformerDenoiser, fields: dict[str, Any]
) -> None:
    """Each step of a trace is replayed by a forward of the whole sequence."""
    with LLM(CHECKPOINT, dtype="float32", device="cpu") as llm:
        block = 12 if "dream" in fields.get("unmask", "") else 6
        params = SamplingParams(max_tokens=12, block_length=block, trace=True, ignore_eos=True, **fields)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    trace = output.outputs[0].trace
    assert trace is not None
    ids = np.array(PROMPT + [MASK] * 12)
    for step in range(1, max(trace.step) + 1):
        logits = logits_of(dream, ids)
        logits[:, MASK] = -torch.inf
        for event in (place for place, own in enumerate(trace.step) if own == step):
            row = logits[len(PROMPT) + trace.position[event] - 1]
            if trace.is_commit[event]:
                assert trace.is_top[event] == (int(row.argmax()) == trace.token[event]), event
                ids[len(PROMPT) + trace.position[event]] = trace.token[event]
            else:
                ids[len(PROMPT) + trace.position[event]] = MASK
    assert ids[len(PROMPT) :].tolist() == output.outputs[0].token_ids
