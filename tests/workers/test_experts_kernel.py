"""The grouped products of experts against one product for each expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from remask.workers.kernels.experts import experts
from remask.workers.models import row_ops

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []  # then they are about what Triton compiles
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else []))
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

NUM_EXPERTS, NUM_ACTIVE, DIM, SIZE = 11, 3, 40, 72  # no power of two, and no multiple of a tile
Weights = tuple[Tensor, Tensor]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weights(dtype: torch.dtype) -> Weights:
    gate_up = random(NUM_EXPERTS, 2 * SIZE, DIM, dtype=dtype, seed=1) / DIM**0.5
    return gate_up, random(NUM_EXPERTS, DIM, SIZE, dtype=dtype, seed=2) / SIZE**0.5


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows, and the weights of their experts."""
    return random(count, DIM, dtype=dtype, seed=4), random(count, NUM_ACTIVE, dtype=dtype, seed=5)


def routes(kind: str, num_rows: int) -> Tensor:
    """The experts of each row, all different."""
    if kind == "all to the same":
        return torch.arange(NUM_ACTIVE, device=DEVICE).add(NUM_EXPERTS - NUM_ACTIVE).expand(num_rows, -1)
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=torch.Generator().manual_seed(3))
    if kind == "some to none":
        scores[:, ::2] -= 1
    return scores.topk(NUM_ACTIVE).indices.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["spread out", "some to none", "all to the same"])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_rows_get_the_outputs_of_their_experts(num_rows: int, kind: str, dtype: torch.dtype) -> None:
    (x, shares), chosen = rows(num_rows, dtype), routes(kind, num_rows)
    found = experts(x, shares, chosen, *weights(dtype))
    expected = row_ops.experts(x, shares, chosen, *weights(dtype))
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_a_rows_output_depends_on_no_other_row() -> None:
    """Nor on how many rows its experts have, or where among them it is; on a GPU to the bit."""
    x, shares = rows(70)
    chosen, own = routes("spread out", 70), weights(torch.float32)
    together = experts(x, shares, chosen, *own)
    rounding = 0.0 if HAS_GPU else 1e-5  # numpy, which multiplies in the interpreter, rounds by place
    for some in (torch.randperm(70, generator=torch.Generator().manual_seed(6)).to(DEVICE), slice(5)):
        found = experts(x[some], shares[some], chosen[some], *own)
        torch.testing.assert_close(found, together[some], rtol=rounding, atol=rounding)


def test_a_row_of_nan_reaches_no_other_row() -> None:
    x, shares = rows(9)
    chosen, own = routes("all to the same", 9), weights(torch.float32)
    expected = experts(x, shares, chosen, *own)
    x[4] = torch.nan
    found = experts(x, shares, chosen, *own)
    assert found[4].isnan().all()
    assert torch.equal(found[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])
