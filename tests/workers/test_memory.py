"""Memory: errors that say there was too little, and how many rows fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.failures import is_out_of_memory
from remask.workers.head import Statistics
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import Denoiser, TransformerDenoiser
from remask.workers.rows.pack import HeadQuery, PackedRows
from remask.workers.startup.memory import (
    MAX_ROWS,
    RESERVE_BYTES,
    demanding_burst,
    demanding_canvas,
    limit_from,
    measure,
    row_limit,
)
from remask.workers.worker import Worker

CONFIG = ModelConfig(vocab_size=100, max_len=32, mask_id=0, eos_ids=(1,), eot_id=None)
ROWS_64 = demanding_canvas(CONFIG).num_rows


def test_the_errors_of_both_allocators_on_a_cpu_are_known() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**60, dtype=np.uint8)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_numpy.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_errors_of_a_gpu_and_its_libraries_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448."),
        ValueError("out of memory"),
        AssertionError(),
    ],
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_the_errors_of_the_allocators_for_a_gpu_are_known(pinned: bool) -> None:
    where: dict[str, Any] = {"pin_memory": True} if pinned else {"device": "cuda"}
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**50, dtype=torch.uint8, **where)
    assert is_out_of_memory(info.value)


@given(
    st.integers(1, 10**5),
    st.integers(0, 10**9),
    st.integers(0, 10**11),
    st.integers(1, 100),
    st.integers(2, 9),
)
def test_the_rows_of_the_limit_fit_and_one_more_does_not(
    row_bytes: int, fixed_bytes: int, budget: int, smallest: int, growth: int
) -> None:
    def peak(num_rows: int) -> int:
        return fixed_bytes + row_bytes * num_rows

    sizes = [smallest, smallest * growth, smallest * growth**2]
    limit = limit_from([(num_rows, peak(num_rows)) for num_rows in sizes], budget)
    assert peak(limit + 1) > budget
    assert limit == 0 or peak(limit) <= budget


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(64, 9000), (256, 10_000), (1024, 17_680)], 9256),  # what is read at first is something else
        ([(64, 6400)], 1000),
        ([(64, 6400), (256, 6400)], 4000),  # flat: no line to read
        ([], 0),
    ],
)
def test_the_last_two_points_decide(points: list[tuple[int, int]], expected: int) -> None:
    assert limit_from(points, 100_000) == expected


@pytest.mark.parametrize("smallest", [64, 1024, 100_000])
def test_rows_grow_until_peaks_are_linear_with_at_least_two_sizes(smallest: int) -> None:
    points, too_many = measure(lambda num_rows: num_rows * 3, smallest)
    sizes = [num_rows for num_rows, _ in points]
    assert too_many is None
    assert sizes[0] == smallest
    assert all(size % smallest == 0 for size in sizes)
    assert points == [(size, size * 3) for size in sizes]
    assert len(sizes) == 2 or MAX_ROWS // 4 < sizes[-1] <= MAX_ROWS


def test_measuring_ends_with_what_does_not_fit() -> None:
    def peak_bytes(num_rows: int) -> int | None:
        return num_rows if num_rows <= 1000 else None

    assert measure(peak_bytes, 64) == ([(64, 64), (256, 256)], 1024)
    assert measure(peak_bytes, 2000) == ([], 2000)


class Recorder(Denoiser):
    """Proposes the same token in every row with low confidence, and records its calls."""

    def __init__(self) -> None:
        self.config, self.mask_id, self.device = CONFIG, CONFIG.mask_id, torch.device("cpu")
        self.pack_rows, self.static_shapes = 1 << 30, True
        self.asked: list[tuple[PackedRows, HeadQuery]] = []

    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        self.asked.append((rows, query))
        found = Statistics.blank(len(rows.slots_N), self.device)
        found.ids.fill_(5)
        found.neg_entropy.fill_(-1.0)
        return found


def test_a_demanding_burst_reads_every_statistic_of_every_row() -> None:
    model = Recorder()
    batch = demanding_burst(CONFIG, 4 * ROWS_64)
    assert len(batch.specs) == 4
    Worker(model).run(batch)
    rows, query = model.asked[-1]
    assert len(rows.ids_T) == 4 * ROWS_64
    assert query.needs == {"margin", "entropy"}
    assert (query.temperature[: rows.num_main_slots] > 0).all()
    assert len(rows.candidates_H) == len(rows.slots_N) == len(rows.ids_T)
    assert query.special is not None
    assert len(query.special) == ROWS_64 // 2, "one canvas asks for whole logits, for each slot once"


class Gpu:
    """Stands in for torch's view of a GPU: a forward takes 1 MB and 1 kB a row for a moment."""

    total, weights = 8 << 30, 2 << 30

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int = 0) -> None:
        self.others, self.peak, self.sizes, self.most_rows = others, 0, list[int](), 1 << 30
        for name, function in {
            "empty_cache": lambda: None,
            "memory_allocated": lambda _: self.weights,
            "memory_reserved": lambda _: self.weights,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", self.weights),
            "max_memory_allocated": lambda _: self.peak,
            "mem_get_info": lambda _: (self.total - self.weights - self.others, self.total),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def run(self, batch: StepBatch) -> StepResult:
        self.sizes.append(sum(canvas.num_rows(CONFIG.max_len) for canvas in batch.specs))
        self.peak = self.weights + 10**6 + 1000 * self.sizes[-1]
        failure = "memory" if self.sizes[-1] > self.most_rows else None
        return StepResult(burst_id=batch.burst_id, states=[], num_rows=0, seconds=0.0, failure=failure)


def on_gpu() -> Any:
    return SimpleNamespace(device=torch.device("cuda"), config=CONFIG)


@pytest.mark.parametrize(
    ("utilization", "others", "room"), [(1.0, 0, 6 << 30), (0.75, 0, 4 << 30), (1.0, 2 << 30, 4 << 30)]
)
def test_rows_have_what_weights_others_and_the_reserve_leave(
    monkeypatch: pytest.MonkeyPatch, utilization: float, others: int, room: int
) -> None:
    gpu = Gpu(monkeypatch, others)
    assert row_limit(on_gpu(), utilization, gpu.run) == (room - RESERVE_BYTES - 10**6) // 1000
    assert gpu.sizes == [64, 64, 256, 1024, 4096, 16384], "the first is for what stays"


@pytest.mark.parametrize(("utilization", "most_rows"), [(0.3, 1 << 30), (0.9, 0)])
def test_a_gpu_that_the_weights_fill_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, utilization: float, most_rows: int
) -> None:
    gpu = Gpu(monkeypatch)
    gpu.most_rows = most_rows
    with pytest.raises(InvalidRequest, match="gpu_memory_utilization: leaves no room") as info:
        row_limit(on_gpu(), utilization, gpu.run)
    assert info.value.value == utilization


def test_the_limit_stays_below_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    gpu.most_rows = 1000
    assert row_limit(on_gpu(), 0.9, gpu.run) == 1023


def test_a_cpu_has_no_limit(golden_model: TransformerDenoiser) -> None:
    assert row_limit(golden_model, 0.9, Worker(golden_model).run) is None
