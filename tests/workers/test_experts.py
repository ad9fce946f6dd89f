"""A layer of experts against its definition, one row and one expert at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from remask.workers.models.config import ExpertsConfig
from remask.workers.models.experts import Experts
from remask.workers.models.row_ops import EAGER

DIM, COUNT, ACTIVE, SIZE = 24, 7, 3, 20


def layer(shared_size: int | None) -> Experts:
    generator = torch.Generator().manual_seed(0)
    config = ExpertsConfig(count=COUNT, num_active=ACTIVE, size=SIZE, shared_size=shared_size)
    own = Experts(config, DIM).to_empty(device="cpu")
    for parameter in own.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return own


def mlp(x_D: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x_D).chunk(2)
    return down @ (silu(gate) * up)


@pytest.mark.parametrize("shared_size", [None, 9])
@pytest.mark.parametrize("num_rows", [0, 1, 1200])
def test_a_row_is_the_weighted_sum_of_its_experts(num_rows: int, shared_size: int | None) -> None:
    """The weights are the router's probabilities, which do not add up to 1; a shared expert is added whole.
    More rows than are gathered at a time change nothing."""
    own = layer(shared_size)
    x_TD = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1))
    found = own(x_TD, EAGER)
    assert found.shape == x_TD.shape
    for row in range(0, num_rows, 100):
        x = x_TD[row]
        probabilities = (own.router @ x).softmax(0)
        expected = torch.zeros(DIM)
        for expert in probabilities.argsort(descending=True)[:ACTIVE]:
            expected += probabilities[expert] * mlp(x, own.gate_up[expert], own.down[expert])
        if own.shared_gate_up is not None and own.shared_down is not None:
            expected += mlp(x, own.shared_gate_up, own.shared_down)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
