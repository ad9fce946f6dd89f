"""Canvases at fault: logits that are not numbers, policies that raise, or commit nothing where they must."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from remask import SamplingParams
from remask.scheduler.canvas import (
    NO_COMMIT,
    NO_MEMORY,
    NOT_NUMBERS,
    RAISES,
    Canvas,
    CanvasState,
    new_canvas,
)
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.burst import groups
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.worker import Worker

POISON = 20  # an id whose embedding is not a number
KINDS: list[dict[str, Any]] = [
    {"unmask": "threshold:0.5"},
    {"unmask": "schedule:4", "temperature": 1.0, "top_p": 0.8},
    {"unmask": "schedule:4", "temperature": 1.0, "top_k": 5},
    {"unmask": "schedule:4", "temperature": 1.0, "min_p": 0.1},
    {"unmask": "capped_threshold:0.3", "remask": "wino:0.9"},
    {"unmask": "threshold:0.3", "remask": "low_prob:0.6"},
    {"unmask": "schedule:4", "cfg_scale": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9"},
    {"unmask": "schedule:4", "remask": "rcr"},
    {"unmask": "dream:steps=4"},
    {"remask": "saber"},
    {"remask": "remdm:6"},
]


@pytest.fixture(
    scope="module",
    params=[
        "fitting",
        "fixed",
        pytest.param("fixed with kernels", marks=pytest.mark.slow),
    ],
)
def poisoned(request: pytest.FixtureRequest, golden_model: TransformerDenoiser) -> TransformerDenoiser:
    model, kernels = copy.deepcopy(golden_model.model), request.param == "fixed with kernels"
    model.embedding.data[POISON] = torch.nan
    if kernels:
        del model.blocks[2:]  # each takes the interpreter as long
    fixed = request.param != "fitting"
    return TransformerDenoiser(
        model, SdpaAttention(), pack_rows=1 << 30, static_shapes=fixed, kernels=kernels
    )


def make(prompt: list[int], fields: dict[str, Any]) -> Canvas:
    block = {} if "dream" in fields.get("unmask", "") else {"block_length": 4}
    params = resolve(SamplingParams(max_tokens=8, **block, **fields))
    return new_canvas("r", 0, prompt, params, seed=3, sample=0, mask_id=0, stop_ids=[])


def run(model: TransformerDenoiser, canvases: list[Canvas]) -> list[CanvasState]:
    states: list[CanvasState | int] = [c.state for c in canvases]
    batch = StepBatch(burst_id=0, num_steps=40, specs=[c.spec for c in canvases], states=states)
    worker, result = Worker(model), None
    for _ in range(10):  # a burst ends early if a canvas pauses
        result = worker.run(batch).states
        if all(state.finished or state.fault for state in result):
            break
        batch = StepBatch(burst_id=0, num_steps=40, specs=batch.specs, states=[*result])
    assert result is not None
    return result


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_canvas_of_nan_is_at_fault_and_its_neighbours_are_not(
    poisoned: TransformerDenoiser, fields: dict[str, Any]
) -> None:
    if poisoned.kernels and fields != KINDS[4]:
        pytest.skip("Triton's interpreter is slow; the fused head knows no policy, but rows that verify")
    good = [make([5, 11, 7], fields), make([9, 12], {"unmask": "threshold:0.5"})]
    expected = run(poisoned, good)
    first, bad, second = run(poisoned, [good[0], make([5, POISON, 7], fields), good[1]])
    assert (bad.fault, bad.finished) == (NOT_NUMBERS, False)
    assert bad.tokens == make([5, POISON, 7], fields).state.tokens, "it keeps what it holds"
    for found, alone in zip((first, second), expected, strict=True):
        assert (found.fault, found.finished) == (0, True)
        assert found.tokens == alone.tokens


def test_a_policy_that_commits_nothing_ends_its_canvas(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_of = groups.kernel_of

    def idle(kind: type) -> Any:
        kernel = kernel_of(kind)
        if kernel.__name__ != "threshold":
            return kernel
        return lambda view, params: torch.zeros_like(view.masked)

    monkeypatch.setattr(groups, "kernel_of", idle)
    bad, good = run(
        golden_model, [make([5, 11], {"unmask": "threshold:0.5"}), make([5, 11], {"unmask": "schedule"})]
    )
    assert (bad.fault, bad.finished) == (NO_COMMIT, False)
    assert (good.fault, good.finished) == (0, True)


BAD = 0.4321  # kernels fail for policies with this threshold


def fails_for_bad(kernel: Any, fail: Callable[[Any], Any]) -> Any:
    """A kernel that fails for policies with `BAD`, and raises for canvases without a mask."""

    def call(view: Any, *rest: Any) -> Any:
        (params,) = (each for each in rest if isinstance(each, dict) and "t" in each)
        if not view.masked.any(1).all():
            raise IndexError("nothing to decide")
        decision = kernel(view, *rest)
        return fail(decision) if bool((params["t"] == BAD).any()) else decision

    return call


def raises(error: Exception) -> Callable[[Any], Any]:
    def fail(decision: Any) -> Any:
        raise error

    return fail


def forgets(decision: Any) -> Any:
    """Drops the last field of a decision's memory, or the whole decision if it has no memory."""
    kept = [*getattr(decision, "memory", {}).items()][:-1]
    return decision._replace(memory=dict(kept)) if kept else None


@pytest.mark.parametrize("static_shapes", [False, True], ids=["fitting", "fixed"])
@pytest.mark.parametrize("policy", ["threshold", "low_prob"])
@pytest.mark.parametrize(
    ("fail", "fault", "text"),
    [
        (raises(ValueError("a kernel raised")), RAISES, "ValueError: a kernel raised"),
        (raises(torch.OutOfMemoryError("2 TiB")), NO_MEMORY, "OutOfMemoryError: 2 TiB"),
        (forgets, RAISES, "Error: "),
    ],
    ids=["raises", "exceeds memory", "forgets"],
)
def test_a_kernel_that_raises_ends_its_canvas_and_costs_no_other_a_burst(
    golden_model: TransformerDenoiser,
    monkeypatch: pytest.MonkeyPatch,
    static_shapes: bool,
    policy: str,
    fail: Callable[[Any], Any],
    fault: int,
    text: str,
) -> None:
    model = TransformerDenoiser(
        golden_model.model, SdpaAttention(), pack_rows=1 << 30, static_shapes=static_shapes, kernels=False
    )

    def make_with(t: float, prompt: list[int]) -> Canvas:
        own = {"unmask": f"threshold:{t}"} if policy == "threshold" else {"remask": f"low_prob:{t}"}
        return make(prompt, {"unmask": "threshold:0.6", "temperature": 1.0, **own})

    good = [*(make_with(0.7, [5 + i, 11]) for i in range(5)), make([5, 11], {"unmask": "schedule"})]
    bad = make_with(BAD, [7, 11])
    expected = run(model, good)
    kernel_of = groups.kernel_of

    def failing(kind: type) -> Any:
        kernel = kernel_of(kind)
        return fails_for_bad(kernel, fail) if kernel.__name__ == policy else kernel

    monkeypatch.setattr(groups, "kernel_of", failing)
    first, *found, second = run(model, [bad, *good, bad])
    for state in (first, second):
        assert (state.fault, state.finished, state.num_forwards) == (fault, False, 0)
        assert text in state.error
        assert state.tokens == bad.state.tokens
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.fault, ours.finished, ours.error) == (0, True, "")
        assert (ours.tokens, ours.commit_steps) == (theirs.tokens, theirs.commit_steps)
        assert ours.memory == theirs.memory


def test_an_error_of_a_kernel_that_loses_the_gpu_is_raised(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = raises(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    monkeypatch.setattr(groups, "kernel_of", lambda kind: lambda view, params: fail(view))
    with pytest.raises(torch.AcceleratorError):
        run(golden_model, [make([5, 11], {"unmask": "threshold:0.5"})] * 2)
