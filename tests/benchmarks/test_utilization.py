"""The arithmetic counted for a run, against a count by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from golden_files import GOLDEN
from step_cases import canvas, finish
from torch.utils.flop_counter import FlopCounterMode

from remask import SamplingParams
from remask.benchmarks.gpu import timing
from remask.benchmarks.utilization import Work, gemm_rate, linear_flops
from remask.scheduler.messages import StepBatch
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.worker import Worker

LAYERS, D, FFN, V = 6, 192, 512, 82


def count(model: TransformerDenoiser, params: SamplingParams, prompts: list[list[int]]) -> Work:
    with Work(model.model) as work:
        finish(model, [canvas(params, prompt) for prompt in prompts])
    return work


def by_hand(main: int, shadows: int, masked: int, read: int) -> int:
    """One forward of one canvas: all rows but the last layer's, then what is read of it and the head."""
    rows, candidates = main + shadows, masked + read
    linear = (LAYERS - 1) * rows * (4 * D * D + 3 * D * FFN) + rows * 2 * D * D
    linear += candidates * (2 * D * D + 3 * D * FFN + D * V)
    seen_by_shadow = main - 1 + shadows
    pairs = (LAYERS - 1) * (main * main + shadows * seen_by_shadow) + masked * main + read * seen_by_shadow
    return 2 * linear + 4 * pairs * D


def test_every_step_is_counted_by_what_it_reads(golden_model: TransformerDenoiser) -> None:
    """One token a step: the masked slots of a block fall from 8 to 1, whatever the weights."""
    prompt = [33, 11, 12, 14]
    params = {"max_tokens": 16, "block_length": 8, "unmask": "schedule", "ignore_eos": True}
    plain = count(golden_model, SamplingParams(**params), [prompt])
    assert plain.packs == 2 * [(20, masked) for masked in range(8, 0, -1)]
    assert plain.flops == 2 * sum(by_hand(20, 0, masked, 0) for masked in range(8, 0, -1))
    verified = count(golden_model, SamplingParams(**params, remask="wino:0"), [prompt])
    steps = [(20, 0, 8, 0), *((20, 8, 8 - n, n) for n in range(1, 8))]
    assert verified.packs == 2 * [(main + shadows, masked + read) for main, shadows, masked, read in steps]
    assert verified.flops == 2 * sum(by_hand(*step) for step in steps)


def test_other_requests_change_no_count(golden_model: TransformerDenoiser) -> None:
    prompts = [[33, 11, 12, 14] * n for n in (1, 3, 7)]
    params = SamplingParams(max_tokens=20, unmask="threshold:0.7", ignore_eos=True, seed=0)
    together = count(golden_model, params, prompts)
    assert together.flops == sum(count(golden_model, params, [prompt]).flops for prompt in prompts)
    assert len(together.packs) < sum(len(count(golden_model, params, [p]).packs) for p in prompts)


def test_shared_rows_are_counted_once(golden_model: TransformerDenoiser) -> None:
    prompt, params = [33, 11, 12, 14], SamplingParams(max_tokens=8, unmask="schedule", ignore_eos=True)
    alone, twice = (count(golden_model, params, [prompt] * number) for number in (1, 2))
    assert alone.packs == [(12, masked) for masked in range(8, 0, -1)]
    assert twice.packs == [(12, 2 * masked) for masked in range(8, 0, -1)]
    assert alone.flops < twice.flops < 2 * alone.flops


@pytest.mark.parametrize("checkpoint", ["dream-tiny", "lladamoe-tiny"])
def test_the_arithmetic_of_a_family_is_what_torch_counts(checkpoint: str) -> None:
    """But for attention, of which torch's counter does not see the CPU kernel."""
    model = load_denoiser(GOLDEN / checkpoint, dtype="float32", device="cpu")
    own = timing.canvases(model.config, 3, 5, 8)
    batch = StepBatch(burst_id=0, num_steps=8, specs=[c.spec for c in own], states=[c.state for c in own])
    with FlopCounterMode(display=False) as counter, Work(model.model) as work:
        assert all(state.finished for state in Worker(model).run(batch).states)
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in by_operation.items() if "attention" not in str(operation))
    assert products == sum(linear_flops(model.config, *pack) for pack in work.packs)


def test_other_models_are_not_counted(golden_model: TransformerDenoiser) -> None:
    other = load_denoiser(GOLDEN / "dream-tiny", dtype="float32", device="cpu")
    with Work(other.model) as work:
        finish(golden_model, [canvas(SamplingParams(max_tokens=4), [5, 6])])
    assert work.packs == []


def test_nothing_is_counted_once_it_is_closed(golden_model: TransformerDenoiser) -> None:
    work = count(golden_model, SamplingParams(max_tokens=4), [[5, 6]])
    before = work.flops
    finish(golden_model, [canvas(SamplingParams(max_tokens=4), [5, 6])])
    assert work.flops == before > 0


@pytest.mark.parametrize(("num_rows", "num_candidates"), [(50, 7), (9, 9)])
@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny", "lladamoe-tiny"])
def test_the_rate_is_that_of_the_counted_layers(checkpoint: str, num_rows: int, num_candidates: int) -> None:
    model = load_denoiser(GOLDEN / checkpoint, dtype="float32", device="cpu").model
    with FlopCounterMode(display=False) as counter:
        rate = gemm_rate(model, [(num_rows, num_candidates)])
    assert counter.get_total_flops() == linear_flops(model.config, num_rows, num_candidates)
    assert rate > 0
    assert torch.is_inference_mode_enabled() is False
