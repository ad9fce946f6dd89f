"""Static packing gives the results of compact packing, without reading from the device on the host."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_cases import step_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remask import SamplingParams
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas, new_scored_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.burst.staging import to_device
from remask.workers.burst.state import BurstState
from remask.workers.kernels import experts
from remask.workers.models import row_ops
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.loading import read_config
from remask.workers.models.transformer import Transformer
from remask.workers.step import denoise, pack, plan_packs
from remask.workers.tensors import mapped, tensors_of
from remask.workers.worker import Worker

POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.5"},
    {"unmask": "schedule:score=random", "temperature": 1.0},
    {"unmask": "schedule:steps=9,score=margin", "temperature": 0.7, "rank": "top", "top_p": 0.8, "top_k": 9},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95", "trace": True, "logprobs": 1},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95,tile=self"},
    {"unmask": "threshold:0.3", "remask": "low_prob:0.6,max_times=2,post_steps=3"},
    {"remask": "saber:3,2"},
    {"unmask": "dream:steps=7,alg=maskgit_plus,alg_temp=0.3", "temperature": 0.8},
    {"unmask": "schedule:steps=9", "remask": "rcr", "temperature": 0.5},
    {"remask": "remdm:10,cap,0.3", "temperature": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9"},
    {"unmask": "capped_threshold:0.2", "remask": "wino:t2=0.95,ban_old=true"},
    {"unmask": "schedule", "cfg_scale": 1.5, "temperature": 0.6},
    {"unmask": "entropy_bound:1.0", "logit_bias": {5: 3.0}, "bad_token_ids": [7], "min_p": 0.05},
    {"unmask": "bernoulli:2.0", "suppress_eos_confidence": True},
    {"unmask": "factor:1.0", "stop": ["x"]},
]
HOST_READS = (
    "_local_scalar_dense",
    "lift_fresh",
    "nonzero",
    "masked_select",
    "unique",
    "item",
    "repeat_interleave",
)


class Unlaunched:
    """In the place of a kernel of experts, which Triton's interpreter would run on the host."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda x, weights, out, *_, **__: out.zero_()


class Blind(TorchDispatchMode):
    """Refuses every operation that waits for the device, whose shape depends on its numbers, or that brings
    numbers from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_flags = any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if "index" in name and len(args) > 1 and isinstance(args[1], list) else ())
        )
        assert not by_flags, name
        assert not any(read in name for read in HOST_READS), name
        return func(*args, **(kwargs or {}))


def canvas(
    fields: dict[str, Any], canvas_len: int, block_len: int, prompt_len: int, seed: int = 5, mask_id: int = 0
) -> Canvas:
    block = {} if "dream" in fields.get("unmask", "") else {"block_length": min(block_len, canvas_len)}
    params = resolve(SamplingParams(max_tokens=canvas_len, **block, **fields))
    prompt = ([33, 11, 12, 14] * 5)[:prompt_len]
    return new_canvas("r", 0, prompt, params, seed=seed, sample=0, mask_id=mask_id, stop_ids=[3])


def scored(prompt_len: int, canvas_len: int) -> Canvas:
    """A canvas that asks for the probabilities of every other token."""
    tokens = np.array(([33, 11, 12, 14, 40, 7] * 9)[: prompt_len + canvas_len], dtype=np.int32)
    slots = np.arange(prompt_len, prompt_len + canvas_len, 2, dtype=np.int32)
    return new_scored_canvas("r", 0, tokens, slots, seed=0, sample=0, mask_id=0)


def static(model: Transformer) -> TransformerDenoiser:
    """With static shapes, and the experts of a GPU."""
    fixed = TransformerDenoiser(model, SdpaAttention(), pack_rows=1 << 30, static_shapes=True)
    fixed.ops = fixed.ops._replace(experts=experts.experts)
    return fixed


@pytest.fixture(scope="module")
def fixed_model(request: pytest.FixtureRequest) -> TransformerDenoiser:
    checkpoint = GOLDEN / getattr(request, "param", "llada-tiny")
    return static(load_denoiser(checkpoint, dtype="float32", device="cpu").model)


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_grouped_product", Unlaunched())
    monkeypatch.setattr(experts, "silu_mul", row_ops.silu_mul)


@pytest.fixture(scope="module")
def short_model(golden_model: TransformerDenoiser) -> TransformerDenoiser:
    """Two of the model's layers, because Triton's interpreter is slow."""
    model = copy.deepcopy(golden_model.model)
    del model.blocks[2:]
    return TransformerDenoiser(model, SdpaAttention(), pack_rows=1 << 30)


def finish(model: TransformerDenoiser, canvases: list[Canvas], num_steps: int) -> list[CanvasState]:
    worker, states = Worker(model), [c.state for c in canvases]
    places: list[int] = []
    for burst_id in range(1000):
        live = [i for i, state in enumerate(states) if not state.finished]
        if not live:
            return states
        sent: list[CanvasState | int] = [places.index(i) if i in places else states[i] for i in live]
        follows = burst_id - 1 if places else None
        specs = [canvases[i].spec for i in live]
        batch = StepBatch(burst_id=burst_id, num_steps=num_steps, follows=follows, specs=specs, states=sent)
        places = live
        for i, state in zip(live, worker.run(batch).states, strict=True):
            states[i] = state
    raise AssertionError("it never ends")


def same(states: list[CanvasState], others: list[CanvasState]) -> None:
    """Equal but for the last bits of probabilities, which other shapes round differently."""
    for one, other in zip(states, others, strict=True):
        for name in ("tokens", "commit_steps", "num_forwards", "block", "removed"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("confidences", "logprobs"):
            numbers = (
                torch.frombuffer(bytearray(getattr(s, name)), dtype=torch.float32) for s in (one, other)
            )
            torch.testing.assert_close(*numbers, rtol=1e-3, atol=1e-4)


requests = st.builds(
    canvas,
    st.sampled_from(POLICIES),
    canvas_len=st.integers(1, 30),
    block_len=st.integers(1, 12),
    prompt_len=st.integers(1, 20),
    seed=st.integers(0, 9),
)


@pytest.mark.parametrize("fields", POLICIES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_policy_writes_in_static_shapes_what_it_writes_in_compact_packs(
    golden_model: TransformerDenoiser, fixed_model: TransformerDenoiser, fields: dict[str, Any]
) -> None:
    own = [canvas(fields, 21, 8, 4), canvas({"unmask": "threshold:0.5"}, 10, 4, 9), canvas(fields, 9, 5, 2)]
    same(finish(fixed_model, own, 3), finish(golden_model, own, 3))


def test_targets_are_written_and_scored_in_static_shapes_too(
    golden_model: TransformerDenoiser, fixed_model: TransformerDenoiser
) -> None:
    own = [scored(4, 9), canvas({"unmask": "threshold:0.5", "temperature": 1.0}, 10, 4, 9), scored(2, 20)]
    states = finish(golden_model, own, 2)
    same(finish(fixed_model, own, 3), states)
    for written, state in zip(own, states, strict=True):
        if written.spec.targets:
            assert written.spec.canvas_tokens(state).tobytes() == written.spec.targets
            assert state.num_forwards == 1


@pytest.mark.slow
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(own=st.lists(requests, min_size=1, max_size=5), num_steps=st.integers(1, 9))
def test_any_mix_writes_the_same_in_static_shapes(
    golden_model: TransformerDenoiser, fixed_model: TransformerDenoiser, own: list[Canvas], num_steps: int
) -> None:
    same(finish(fixed_model, own, num_steps), finish(golden_model, own, 2))


GIVEN, LOG_MARGIN = 4, 5  # of what `answers` gives for a slot
VERIFYING = ["wino", "wino:tile=self", "oracle_loo", "low_prob", "random", None]


@torch.inference_mode()
def answers(model: TransformerDenoiser, own: list[Canvas], states: list[CanvasState]) -> dict[Any, Tensor]:
    """All statistics of the requested rows, by (whether it is a main row, slot)."""
    state = BurstState([c.spec for c in own], states)
    (plan,) = plan_packs(state, model, model.pack_rows)
    rows, query = pack(plan, step_inputs(state, model.mask_id, frozenset({"margin", "entropy"})), model)
    found = model.statistics(rows, query)
    asked = query.live.tolist() if query.live is not None else [True] * len(rows.slots_N)
    return {
        (place < rows.num_main_slots, slot): torch.cat([found.ids[:, place].double(), found.reals[:, place]])
        for place, slot in enumerate(rows.slots_N.tolist())
        if asked[place]
    }


@pytest.mark.parametrize(
    ("kernels", "attention"),
    [
        (False, "sdpa"),
        pytest.param(True, "sdpa", marks=pytest.mark.slow),
        (False, "dense"),
    ],
)
@pytest.mark.parametrize("num_steps", [3, 10], ids=["a whole block", "a shorter one"])
def test_every_requested_row_has_the_same_statistics_in_static_shapes(
    golden_model: TransformerDenoiser,
    short_model: TransformerDenoiser,
    dense_attention: AttentionBackend,
    num_steps: int,
    kernels: bool,
    attention: str,
) -> None:
    backend = SdpaAttention() if attention == "sdpa" else dense_attention
    compact = short_model if kernels else golden_model
    fixed = TransformerDenoiser(
        compact.model, backend, pack_rows=1 << 30, static_shapes=True, kernels=kernels
    )
    own = [
        canvas(
            {"unmask": "schedule", "remask": remask, "logit_bias": {5: 3.0} if i % 2 else None}, 11, 8, 4 + i
        )
        for i, remask in enumerate(VERIFYING)
    ]
    own.append(canvas({"unmask": "schedule", "cfg_scale": 1.5}, 11, 8, 3))
    own = [replaced(c, stop_ids=b"") for c in own]
    batch = StepBatch(
        burst_id=0, num_steps=num_steps, specs=[c.spec for c in own], states=[c.state for c in own]
    )
    states = Worker(compact).run(batch).states
    assert [state.block for state in states] == [num_steps // 8] * len(own)
    expected, found = answers(compact, own, states), answers(fixed, own, states)
    assert found.keys() == expected.keys()
    assert any(not is_main for is_main, _ in expected)
    for key, numbers in expected.items():
        # Of rows that verify, only the probability of the given token is read.
        read = [i for i in range(len(numbers)) if i != LOG_MARGIN] if key[0] else [GIVEN]
        torch.testing.assert_close(found[key][read], numbers[read], rtol=1e-4, atol=1e-5)
        if key[0]:
            # The logarithm of a margin is as precise as the difference of two close probabilities.
            margin, expected_margin = (x[LOG_MARGIN].exp() for x in (found[key], numbers))
            torch.testing.assert_close(margin, expected_margin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("remask", "expected"), [(None, 8), ("wino", 8), ("oracle_loo", 8), ("low_prob", 8), ("rcr", 8)]
)
@torch.inference_mode()
def test_whole_logits_are_made_of_no_more_rows_than_can_be_live(
    fixed_model: TransformerDenoiser, remask: str | None, expected: int
) -> None:
    own = [canvas({"unmask": "schedule", "remask": remask, "logit_bias": {5: 3.0}}, 16, 8, 3)]
    state = BurstState([c.spec for c in own], [c.state for c in own])
    (plan,) = plan_packs(state, fixed_model, fixed_model.pack_rows)
    for _ in range(3):
        _, query = plan.pack(step_inputs(state, fixed_model.mask_id))
        assert query.special is not None
        assert query.live is not None
        assert len(query.special) == expected
        assert set(query.live.nonzero().squeeze(1).tolist()) <= set(query.special.tolist())
        denoise(state, [plan], fixed_model)


def replaced(own: Canvas, **fields: Any) -> Canvas:
    return Canvas(own.request_id, own.ordinal, msgspec.structs.replace(own.spec, **fields), own.state)


@torch.inference_mode()
@pytest.mark.parametrize("fixed_model", ["llada-tiny", "lladamoe-tiny"], indirect=True)
@pytest.mark.usefixtures("unlaunched")
def test_no_step_of_any_policy_reads_from_the_device(fixed_model: TransformerDenoiser) -> None:
    own = [canvas(fields, 12, 5, 4, mask_id=fixed_model.mask_id) for fields in POLICIES]
    own = [replaced(c, stop_ids=b"") for c in own]
    state = BurstState([c.spec for c in own], [c.state for c in own])
    state.reserve_removed(4)
    plans = plan_packs(state, fixed_model, fixed_model.pack_rows)
    with Blind():
        for _ in range(4):
            denoise(state, plans, fixed_model)
    assert len(state.to_states()) == len(POLICIES), "and it did step"
    assert state.num_forwards.tolist() == [4] * len(POLICIES)


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "lladamoe-tiny"])
@pytest.mark.usefixtures("unlaunched")
def test_every_step_runs_on_the_meta_device(checkpoint: str) -> None:
    """On the meta device, an operation that makes a tensor on the host or reads a value raises an error."""
    meta = torch.device("meta")
    model = Transformer(read_config(GOLDEN / checkpoint)[1])
    fixed = static(model)
    own = [canvas(fields, 12, 5, 4, mask_id=fixed.mask_id) for fields in POLICIES]
    state = BurstState([c.spec for c in own], [c.state for c in own])
    state.reserve_removed(2)
    on_host = (state, plan_packs(state, fixed, fixed.pack_rows))
    tree = mapped(on_host, lambda tensor: torch.empty_like(tensor, device=meta))
    for _ in range(2):
        denoise(*tree, fixed)
    assert all(tensor.is_meta for tensor in tensors_of(tree))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_burst_starts_on_a_gpu_without_waiting_for_it(golden_checkpoint: Path) -> None:
    worker = Worker(load_denoiser(golden_checkpoint, dtype="bfloat16", device="cuda"))
    own = [canvas(fields, 12, 5, 4) for fields in POLICIES]
    batch = StepBatch(burst_id=0, num_steps=4, specs=[c.spec for c in own], states=[c.state for c in own])
    expected = worker.run(batch).states  # kernels are compiled and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = worker.launch(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert worker.collect(launched).states == expected


def test_canvases_that_pause_on_the_way_stay_as_they_were(fixed_model: TransformerDenoiser) -> None:
    own = [canvas({"unmask": "schedule"}, 4, 4, 3), canvas({"unmask": "schedule", "stop": ["x"]}, 16, 4, 3)]
    batch = StepBatch(burst_id=0, num_steps=9, specs=[c.spec for c in own], states=[c.state for c in own])
    ended, paused = Worker(fixed_model).run(batch).states
    assert (ended.finished, ended.num_forwards) == (True, 4)
    assert (paused.finished, paused.num_forwards, paused.block) == (False, 4, 1)
    goes_on = msgspec.structs.replace(batch, burst_id=1, follows=0, num_steps=3, states=[0, 1])
    worker = Worker(fixed_model)
    worker.run(batch)
    assert worker.run(goes_on).states[1].num_forwards == 7


@pytest.mark.slow
def test_the_fused_head_answers_as_whole_logits_do(short_model: TransformerDenoiser) -> None:
    fused, fixed = (
        TransformerDenoiser(
            short_model.model, SdpaAttention(), pack_rows=1 << 30, static_shapes=True, kernels=kernels
        )
        for kernels in (True, False)
    )
    own = [*(canvas(POLICIES[i], 8, 4, 3) for i in (1, 3, 12, 13)), scored(3, 7)]
    same(finish(fused, own, 4), finish(fixed, own, 4))


def test_a_burst_comes_to_a_device_in_one_piece_of_memory(fixed_model: TransformerDenoiser) -> None:
    own = [canvas(fields, 12, 5, 4) for fields in POLICIES]
    state = BurstState([c.spec for c in own], [c.state for c in own])
    tree = (state, plan_packs(state, fixed_model, fixed_model.pack_rows))
    moved = to_device(tree, torch.device("cpu"))
    before, after = tensors_of(tree), tensors_of(moved)
    assert len(before) > 50
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in after}) == 1
    moved[0].tokens.zero_()
    assert moved[0].to_states()[0].tokens != state.to_states()[0].tokens, "the original is as it was"
