"""Products in tiles, sums of rows, and workers whose model cannot compute so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import burst, canvas

from remask import SamplingParams
from remask.workers.models import denoiser
from remask.workers.models.cpu import multiplies
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.models.row_ops import silu_mul, silu_mul_anywhere
from remask.workers.models.tiles import TILE_ROWS, ignores_places, tile_len, tiled_linear
from remask.workers.row_sums import row_sums
from remask.workers.rows.pack import PackedRows
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import start_worker

SHAPES = [(192, 576), (512, 192), (48, 259), (768, 4096), (1030, 77)]
DTYPES = [d for d in (torch.float32, torch.bfloat16) if multiplies(d, torch.device("cpu"))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_other_rows_do_not_change_the_product_of_a_row(dtype: torch.dtype, num_in: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    rows = torch.randn(5 * TILE_ROWS, num_in, generator=generator).to(dtype)
    if not ignores_places(weight):
        pytest.skip("the products of this CPU depend on places: each canvas is a forward of its own")
    whole = tiled_linear(rows, weight)
    expected = rows.double() @ weight.double().t()
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        whole.double(), expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 0.01)
    )
    order = torch.randperm(len(rows), generator=generator)
    assert torch.equal(tiled_linear(rows[order], weight), whole[order])
    assert torch.equal(tiled_linear(rows[order[:TILE_ROWS]], weight), whole[order[:TILE_ROWS]])


def test_lengths_are_rounded_up_to_tiles() -> None:
    assert [tile_len(count) for count in (0, 1, TILE_ROWS, TILE_ROWS + 1)] == [
        0,
        TILE_ROWS,
        TILE_ROWS,
        2 * TILE_ROWS,
    ]


@pytest.mark.parametrize("skip_nan", [False, True])
def test_a_single_row_has_the_sum_that_it_has_among_others(skip_nan: bool) -> None:
    values = torch.rand(8, 126_464, generator=torch.Generator().manual_seed(0))
    if skip_nan:
        values[:, ::7] = torch.nan
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = row_sums(values, skip_nan=skip_nan)
        alone = [row_sums(row.unsqueeze(0), skip_nan=skip_nan) for row in values]
        assert torch.equal(torch.cat(alone), together)
        if not skip_nan:
            by_threads = torch.stack([row.sum() for row in values])
            assert not torch.equal(by_threads.unsqueeze(1), together), "the case is meant to need it"
    finally:
        torch.set_num_threads(threads)


def test_the_gate_of_a_row_is_the_same_in_any_number_of_rows() -> None:
    assert silu_mul_anywhere(torch.tensor([[-200.0, 1.0]])).item() == 0
    threads, num_others = torch.get_num_threads(), 0
    try:
        torch.set_num_threads(8)
        for seed in range(40):
            rows = torch.randn(3 * TILE_ROWS, 1024, generator=torch.Generator().manual_seed(seed))
            whole, first = silu_mul_anywhere(rows), rows[:TILE_ROWS]
            torch.testing.assert_close(whole, silu_mul(rows))
            assert torch.equal(silu_mul_anywhere(first), whole[:TILE_ROWS])
            num_others += not torch.equal(silu_mul(first), silu_mul(rows)[:TILE_ROWS])
    finally:
        torch.set_num_threads(threads)
    if not num_others:
        pytest.skip("torch's SiLU rounds alike everywhere on this CPU")


@pytest.mark.parametrize("is_possible", [True, False])
def test_without_products_in_tiles_each_canvas_takes_its_own_forward(
    golden_checkpoint: Path, is_possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "ignores_places", lambda weight: is_possible)
    setup = WorkerSetup(model=str(golden_checkpoint), dtype="float32", device="cpu", batch_invariant=True)
    seen: list[int] = []
    statistics = TransformerDenoiser.statistics

    def noted(self: TransformerDenoiser, rows: PackedRows, query: Any) -> Any:
        seen.append(len(rows.layout.cu_keys) - 1)
        return statistics(self, rows, query)

    worker, _ = start_worker(setup)
    monkeypatch.setattr(TransformerDenoiser, "statistics", noted)
    own = [canvas(SamplingParams(max_tokens=8), prompt=[5, 6, 7 + i]) for i in range(3)]
    worker.run(burst(own, [c.state for c in own], 1))
    assert seen == ([3] if is_possible else [1, 1, 1])
