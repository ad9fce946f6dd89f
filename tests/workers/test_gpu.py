"""The most likely faults of the GPU path, none of which shows on a CPU.

These are the order on the stream between bursts, pinned memory that is reused too early, memory of captured
steps, packs without rows, and offsets beyond 32 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from remask import SamplingParams
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.burst.graphs import graphs_for
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.startup.start import WorkerSetup, start_worker
from remask.workers.worker import Worker

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.4"},
    {"unmask": "schedule", "temperature": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"},
]


@pytest.fixture(scope="module")
def model(golden_checkpoint: Path) -> TransformerDenoiser:
    return load_denoiser(golden_checkpoint, dtype="bfloat16", device=str(DEVICE))


def make(i: int, seed: int = 0) -> Canvas:
    fields = POLICIES[i % len(POLICIES)]
    params = resolve(SamplingParams(max_tokens=24, block_length=8, **fields))
    prompt = [5 + i % 3, 11, 7, 9, 12][: 2 + i % 4]
    return new_canvas("r", i, prompt, params, seed=seed, sample=i, mask_id=0, stop_ids=[3])


def burst(canvases: list[Canvas], burst_id: int = 0, num_steps: int = 3) -> StepBatch:
    states: list[CanvasState | int] = [c.state for c in canvases]
    return StepBatch(burst_id=burst_id, num_steps=num_steps, specs=[c.spec for c in canvases], states=states)


def ready(model: TransformerDenoiser, batch: StepBatch) -> Worker:
    """A worker that has captured the batch's shape, if its steps can be captured."""
    worker = Worker(model, graphs_for(model))
    for _ in range(3):
        worker.run(batch)
    return worker


def test_a_burst_launched_before_the_previous_result_is_read_continues_from_it(
    model: TransformerDenoiser,
) -> None:
    """Also if canvases leave and join, so that they move in the device's memory."""
    canvases = [make(i) for i in range(5)]
    first = burst(canvases)
    second = msgspec.structs.replace(first, burst_id=1, follows=0, states=[*range(5)])
    third = StepBatch(
        burst_id=2,
        num_steps=3,
        follows=1,
        specs=[canvases[4].spec, make(7).spec, canvases[1].spec],
        states=[4, make(7).state, 1],
    )

    def sent(batch: StepBatch, before: list[CanvasState]) -> StepBatch:
        states = [before[state] if isinstance(state, int) else state for state in batch.states]
        return msgspec.structs.replace(batch, follows=None, states=[*states])

    expected = [ready(model, first).run(first).states]
    for batch in (second, third):
        expected.append(ready(model, first).run(sent(batch, expected[-1])).states)
    worker = ready(model, first)
    launched = [worker.launch(batch) for batch in (first, second, third)]
    assert [worker.collect(each).states for each in launched] == expected


def test_bursts_in_flight_keep_their_canvases_while_others_are_staged(model: TransformerDenoiser) -> None:
    batches = [burst([make(i, seed) for i in range(3)], burst_id=seed) for seed in range(12)]
    expected = [ready(model, batches[0]).run(batch).states for batch in batches]
    worker = ready(model, batches[0])
    launched = [worker.launch(batch) for batch in batches]
    assert [worker.collect(each).states for each in launched] == expected


def test_a_captured_step_needs_no_memory_that_others_write(model: TransformerDenoiser) -> None:
    batch = burst([make(i) for i in range(3)])
    worker = ready(model, batch)
    expected = worker.run(batch).states
    held = [torch.full((1 << 22,), torch.nan, device=DEVICE) for _ in range(32)]
    torch.cuda.empty_cache()
    held += [torch.full((1 << size,), torch.nan, device=DEVICE) for size in range(8, 22) for _ in range(16)]
    assert worker.run(batch).states == expected
    assert all(bool(numbers.isnan().all()) for numbers in held)


def test_a_step_without_rows_to_read_changes_nothing(model: TransformerDenoiser) -> None:
    """All canvases have ended: no row is live, and padded candidates belong to a sequence without keys."""
    batch = burst([make(i) for i in range(3)], num_steps=100)
    ended = ready(model, batch).run(batch).states
    assert all(state.finished for state in ended)
    again = msgspec.structs.replace(batch, states=[*ended])
    assert Worker(model, graphs_for(model)).run(again).states == ended


def test_a_worker_that_has_started_compiles_no_more_kernels(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    setup = WorkerSetup(
        model=str(golden_checkpoint),
        dtype="bfloat16",
        device=str(DEVICE),
        load_format="auto",
        batch_invariant=False,
        max_num_rows=None,
        attention_backend="auto",
        quantization=None,
        gpu_memory_utilization=0.9,
    )
    worker, _ = start_worker(setup)
    compiled: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    for count in (1, 2, 7):
        for policy in (*POLICIES, {"unmask": "schedule:score=margin"}, {"unmask": "entropy_bound:1.0"}):
            params = resolve(SamplingParams(max_tokens=24, block_length=8, **policy))
            canvases = [
                new_canvas("r", i, [5] * i, params, seed=0, sample=i, mask_id=0, stop_ids=[3])
                for i in range(count)
            ]
            assert worker.run(burst(canvases)).failure is None
    assert compiled == []


def test_rows_beyond_32_bits_of_logits_have_the_references_numbers() -> None:
    from remask.workers.head import Statistics
    from remask.workers.kernels.head import fused_statistics

    num_rows, vocab_size, depth = 17_100, 126_464, 64
    assert num_rows * vocab_size > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    normed = torch.randn(num_rows, depth, device=DEVICE, generator=generator).half()
    head = torch.randn(vocab_size, depth, device=DEVICE, generator=generator).half()
    given = torch.randint(vocab_size, (num_rows,), device=DEVICE, generator=generator)
    out = Statistics.blank(num_rows, DEVICE)
    fused_statistics(
        normed,
        head,
        live_N=torch.arange(num_rows, dtype=torch.int32, device=DEVICE),
        count=torch.tensor([num_rows], dtype=torch.int32, device=DEVICE),
        given_N=given,
        temperature_N=torch.zeros(num_rows, device=DEVICE),
        keys_N=torch.zeros(num_rows, dtype=torch.int64, device=DEVICE),
        mask_id=3,
        needs=frozenset(),
        out=out,
    )
    for rows in (slice(0, 8), slice(-8, None)):
        logits = normed[rows].float() @ head.float().T
        probabilities = logits.softmax(-1)
        logits[:, 3] = -torch.inf
        assert torch.equal(out.top_token[rows], logits.argmax(-1))
        expected = probabilities.gather(1, given[rows].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(out.log_given[rows].exp(), expected, rtol=1e-3, atol=1e-9)
