"""The step of canvases that reuse keys: what a light forward computes, and that nothing else decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from step_cases import POLICIES, burst, finish, step_inputs
from tapes import Recorder
from torch import Tensor

from remask import OracleLoo, SamplingParams
from remask.scheduler.canvas import TOKEN, Canvas, CanvasSpec, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.burst.graphs import StepGraphs
from remask.workers.burst.keys import BurstKeys
from remask.workers.burst.state import BurstState
from remask.workers.key_store import KeyStore
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.transformer import Transformer
from remask.workers.rows.kept import DISCARDED, NOTHING_KEPT
from remask.workers.step import make_keys, pack, plan_keys, plan_packs
from remask.workers.steps import plan_burst, steps_of
from remask.workers.tensors import mapped, tensors_of
from remask.workers.worker import Worker

DREAM = Path(__file__).parents[1] / "data" / "golden" / "dream-tiny"
PROMPT = [33, 11, 12, 14, 20, 21]
REUSING = [own for own in POLICIES if not isinstance(own.get("remask"), OracleLoo)]
GUIDED: dict[str, Any] = {"unmask": "threshold:0.5", "cfg_scale": 1.0}
ROWS: dict[str, dict[str, Any]] = {
    "main": {"unmask": "threshold:0.5"},
    "committed": {"unmask": "threshold:0.3", "remask": "low_prob"},
    "shadow": {"unmask": "capped_threshold:0.3", "remask": "wino"},
    "shadow alone": {"unmask": "capped_threshold:0.3", "remask": "wino:tile=self"},
    "guided": GUIDED,
}


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, golden_model: TransformerDenoiser) -> TransformerDenoiser:
    """One whose row i answers for position i, and one whose row i - 1 does."""
    return golden_model if request.param == "llada" else load_denoiser(DREAM, dtype="float32", device="cpu")


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def exact_model(request: pytest.FixtureRequest, golden_checkpoint: Path) -> TransformerDenoiser:
    """One whose rounding is far below any difference that a wrong key makes: in fp32 a logit of these models
    is off by up to 2e-4, depending on the machine's products."""
    model = load_denoiser(golden_checkpoint.parent / request.param, dtype="float32", device="cpu")
    return TransformerDenoiser(model.model.double(), SdpaAttention(), pack_rows=1 << 30)


def static(model: TransformerDenoiser) -> TransformerDenoiser:
    return TransformerDenoiser(model.model, SdpaAttention(), pack_rows=1 << 30, static_shapes=True)


def canvas(model: TransformerDenoiser, fields: dict[str, Any], seed: int = 5, canvas_len: int = 20) -> Canvas:
    params = resolve(SamplingParams(**{"max_tokens": canvas_len, "block_length": 8, **fields}))
    mask_id, shift = model.mask_id, model.config.shift
    return new_canvas("r", 0, PROMPT, params, seed=seed, sample=0, mask_id=mask_id, stop_ids=[], shift=shift)


def half_filled(own: Canvas, mask_id: int, block: int) -> CanvasState:
    """Its state in a block, with a token in every second slot of it, and the first forward behind it."""
    tokens, spec = own.state.token_array().copy(), own.spec
    before = spec.slot_array[: block * spec.block_length]
    tokens[before] = 40 + np.arange(len(before))
    tokens[spec.slot_array[block * spec.block_length : (block + 1) * spec.block_length : 2]] = 30
    ids = tokens.astype(TOKEN).tobytes()
    return msgspec.structs.replace(
        own.state, tokens=ids, full_tokens=ids, block=block, num_block_forwards=1, num_forwards=3
    )


def statistics(model: TransformerDenoiser, spec: CanvasSpec, before: CanvasState) -> dict[str, Tensor]:
    """What the head says of the slots that a forward asks about."""
    state, kept = BurstState([spec], [before]), NOTHING_KEPT
    if spec.reuse is not None:
        model.keep_rows(200)
        keys = BurstKeys(KeyStore(1, 199), 0, [spec], {0: before})
        kept = keys.rows([before.block], [before.num_block_forwards])
        assert keys.missing == [0]
        make_keys(state, plan_keys(state, keys.missing, kept, model, model.pack_rows), model)
    (plan,) = plan_packs(state, model, model.pack_rows, kept)
    rows, query = pack(plan, step_inputs(state, model.mask_id, state.needs), model)
    found = model.statistics(rows, query)
    live = torch.ones(len(rows.slots_N), dtype=torch.bool) if query.live is None else query.live
    own = {"slots": rows.slots_N[live], "rows": rows.ids_T}
    return {**own, **{name: getattr(found, name)[live] for name in ("log_top", "log_given", "top_token")}}


@pytest.mark.parametrize("reuse", ["prefix", "both"])
@pytest.mark.parametrize("fields", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("has_holes", [False, True])
@pytest.mark.parametrize("shapes", ["live rows", "static"])
def test_a_light_forward_of_the_ids_of_the_keys_says_what_a_full_one_does(
    exact_model: TransformerDenoiser, fields: dict[str, Any], reuse: str, has_holes: bool, shapes: str
) -> None:
    model = static(exact_model) if shapes == "static" else exact_model
    exact = canvas(model, fields)
    if has_holes:  # slots with fixed tokens between them
        tokens = exact.state.token_array().copy()
        fixed = [len(PROMPT) + place for place in (2, 3, 9, 15)]
        tokens[fixed] = 50
        slots = np.setdiff1d(exact.spec.slot_array, fixed).astype(TOKEN)
        exact.spec = msgspec.structs.replace(exact.spec, slots=slots.tobytes())
        tables = {name: bytes(len(slots) * 4) for name in ("confidences", "logprobs", "commit_steps")}
        exact.state = msgspec.structs.replace(exact.state, tokens=tokens.tobytes(), **tables)
    for block in (0, 1, 2 - has_holes):
        before = half_filled(exact, model.mask_id, block)
        light = msgspec.structs.replace(exact.spec, reuse=reuse)
        expected, found = (statistics(model, spec, before) for spec in (exact.spec, light))
        assert len(found.pop("rows")) < len(expected.pop("rows"))
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "fields"),
    [(("llada", "dream")[number % 2], own) for number, own in enumerate([*REUSING, GUIDED])],
    indirect=["model"],
    ids=str,
)
def test_full_forwards_alone_decode_exactly(model: TransformerDenoiser, fields: dict[str, Any]) -> None:
    """`refresh=1`, which users cannot ask for."""
    fields = {"block_length": 6, **fields, "temperature": 0.8, "trace": True}
    exact, full = (canvas(model, fields, canvas_len=12) for _ in range(2))
    full.spec = msgspec.structs.replace(full.spec, reuse="both", refresh=1)
    expected, found = finish(model, [exact, full], 3)
    assert found.num_full_forwards == found.num_forwards
    assert msgspec.structs.replace(found, num_full_forwards=0) == expected
    assert exact.events == full.events


def mixed(
    model: TransformerDenoiser, fields: dict[str, Any], reuse: str, refresh: int | None
) -> list[Canvas]:
    """A canvas that reuses keys, and others beside it."""
    fields = {"block_length": 6, **fields, "temperature": 0.8}
    reusing = {**fields, "reuse": reuse, "refresh": refresh}
    other_block = {} if fields["block_length"] is None else {"block_length": 5}
    return [
        canvas(model, {"unmask": "threshold:0.3", "remask": "oracle_loo", "block_length": 6}, 8, 6),
        canvas(model, reusing, canvas_len=14),
        canvas(model, fields, canvas_len=12),
        canvas(model, {**reusing, **other_block}, 6, 13),
        canvas(model, {"reuse": "both", "block_length": 4}, 7, 8),
    ]


@pytest.mark.parametrize(
    ("model", "fields", "how"),
    [
        (("llada", "dream")[number % 2], fields, (("both", None), ("both", 3), ("prefix", 2))[number % 3])
        for number, fields in enumerate([*REUSING, GUIDED])
    ],
    indirect=["model"],
    ids=str,
)
def test_neither_company_nor_bursts_nor_workers_change_a_token(
    model: TransformerDenoiser, fields: dict[str, Any], how: tuple[str, int | None]
) -> None:
    reuse, refresh = how

    def mix() -> list[Canvas]:
        return mixed(model, fields, reuse, refresh)

    own = mix()[1]
    (whole,) = Worker(model).run(burst([own], [own.state], 1000)).states
    assert whole.finished
    for num_steps in (1, 3):
        other = finish(model, mix(), num_steps)[1]  # each burst on a worker that holds nothing
        assert (other.tokens, other.commit_steps) == (whole.tokens, whole.commit_steps)
        for name in ("num_forwards", "num_full_forwards", "num_query_rows", "num_remasked"):
            assert getattr(other, name) == getattr(whole, name), name


def test_the_rows_of_forwards_are_counted(model: TransformerDenoiser) -> None:
    shift = model.config.shift
    length = len(PROMPT) + 20
    for reuse, light in (
        ("both", [8 + shift] * 2 + [4 + shift]),
        ("prefix", [20 + shift, 12 + shift, 4 + shift]),
    ):
        own = canvas(model, {"unmask": "schedule:10", "reuse": reuse})  # 4, 4 and 2 forwards of the blocks
        (state,) = finish(model, [own])
        assert (state.num_forwards, state.num_full_forwards) == (10, 3)
        assert state.num_query_rows == 3 * length + sum(
            n * rows for n, rows in zip((3, 3, 1), light, strict=True)
        )


def test_a_worker_that_holds_the_keys_does_not_make_them(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = model.make_keys
    monkeypatch.setattr(model, "make_keys", lambda rows: made.append(len(rows.ids_T)) or make(rows))
    own = canvas(model, {"unmask": "schedule:10", "reuse": "both"})
    worker, state = Worker(model), own.state
    for _ in range(10):
        (state,) = worker.run(burst([own], [state], 1)).states
    assert state.finished
    assert made == []
    assert model._kept_keys is None, "the memory is given back"  # type: ignore[attr-defined]
    (expected,) = finish(model, [canvas(model, {"unmask": "schedule:10", "reuse": "both"})], 1)
    assert len(made) == 7, "each light forward on a worker of its own"
    assert expected.tokens == state.tokens


def test_a_burst_that_raises_leaves_no_rows(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = canvas(model, {"unmask": "schedule:10", "reuse": "both"})
    (expected,) = finish(model, [own])
    worker, ask, calls = Worker(model), model.statistics, list[int]()

    def raising(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a kernel raised")
        return ask(*arguments)

    monkeypatch.setattr(model, "statistics", raising)
    assert worker.run(burst([own], [own.state], 8)).failure == "error"
    assert worker._store.is_empty
    assert model._kept_keys is None
    (state,) = worker.run(burst([own], [own.state], 1000)).states
    assert state == expected


@pytest.mark.parametrize(
    ("fields", "how"),
    [(fields, (("both", None), ("prefix", 2))[number % 2]) for number, fields in enumerate(ROWS.values())],
    ids=ROWS,
)
def test_static_shapes_write_the_same(
    model: TransformerDenoiser, fields: dict[str, Any], how: tuple[str, int | None]
) -> None:
    names = ("tokens", "commit_steps", "num_forwards", "num_full_forwards", "num_query_rows")
    expected = finish(model, mixed(model, fields, *how))
    for own in (
        finish(static(model), mixed(model, fields, *how), 3),
        chained(model, mixed(model, fields, *how)),
    ):
        for found, state in zip(own, expected, strict=True):
            assert [getattr(found, name) for name in names] == [getattr(state, name) for name in names]


def chained(model: TransformerDenoiser, canvases: list[Canvas]) -> list[CanvasState]:
    """The canvases of one worker with static shapes, whose bursts follow each other."""
    worker, specs = Worker(static(model)), [own.spec for own in canvases]
    result = worker.run(burst(canvases, [own.state for own in canvases], 2))
    for burst_id in range(1, 100):
        if all(state.finished for state in result.states):
            break
        places = list(range(len(specs)))
        batch = StepBatch(burst_id=burst_id, num_steps=2, follows=burst_id - 1, specs=specs, states=[*places])
        result = worker.run(batch)
        assert result.failure is None
    return result.states


@pytest.mark.parametrize("kind", ["main", "shadow"])
def test_graphs_of_light_forwards_write_the_same(
    model: TransformerDenoiser, dense_attention: AttentionBackend, kind: str
) -> None:
    fixed = TransformerDenoiser(model.model, dense_attention, pack_rows=1 << 30, static_shapes=True)
    recorder = Recorder()
    worker = Worker(fixed, StepGraphs(model.device, recorder))
    for number in range(3):
        own = [canvas(model, {**ROWS[kind], "reuse": "both"}, seed=number + i) for i in range(2)]
        states = [each.state for each in own]
        while not all(state.finished for state in states):
            result = worker.run(burst(own, states, 4))
            assert result.failure is None
            states = result.states
        assert [s.tokens for s in states] == [s.tokens for s in finish(model, own)]
    assert recorder.tapes


@pytest.mark.parametrize("are_missing", [False, True])
def test_every_step_of_a_burst_runs_on_the_meta_device(model: TransformerDenoiser, are_missing: bool) -> None:
    """Where an operation that makes a tensor on the host or reads a value raises an error."""
    kinds = [{**fields, "reuse": reuse} for fields in ROWS.values() for reuse in ("both", "prefix", None)]
    own = [canvas(model, fields) for fields in kinds]
    specs, states = [each.spec for each in own], [each.state for each in own]
    if are_missing:  # the keys of a block that another worker has begun
        states = Worker(model).run(burst(own, [*states], 1)).states
    reusing = {place: state for place, state in enumerate(states) if specs[place].reuse}
    keys = BurstKeys(KeyStore(1, 999), 0, specs, reusing)
    assert keys.missing == ([*reusing] if are_missing else [])
    state = BurstState(specs, states)
    state.reserve_removed(3)
    on_meta = static(TransformerDenoiser(Transformer(model.config), SdpaAttention(), pack_rows=1 << 30))
    on_meta.keep_rows(1000)
    on_host = (state, plan_burst(state, on_meta, on_meta.pack_rows, keys))
    tree = mapped(on_host, lambda tensor: torch.empty_like(tensor, device="meta"))
    step = steps_of(*tree, on_meta, lambda later: later())
    assert sum(step() for _ in range(3)) > 0
    assert all(tensor.is_meta for tensor in tensors_of(tree))


def test_rows_of_a_burst_in_flight_are_waited_for(
    model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (canvas(model, {**ROWS["main"], "reuse": "both"}, seed=seed) for seed in (1, 2))
    worker = Worker(static(model), max_key_rows=first.spec.num_key_rows(first.state.sequence_len) + 1)
    with monkeypatch.context() as patched:
        patched.setattr("remask.workers.worker.Launched.wait", lambda self: None)  # a CPU waits at once
        running = worker.launch(burst([first], [first.state], 2))
    after = msgspec.structs.replace(burst([second], [second.state], 2), burst_id=1)
    assert worker.run(after).failure is None
    assert worker.collect(running).failure is None


def test_the_row_that_takes_what_is_not_kept_is_a_number(model: TransformerDenoiser) -> None:
    model.keep_rows(5)
    assert model._kept_keys is not None
    assert not model._kept_keys[:, :, DISCARDED].any()
    model.keep_rows(0)
