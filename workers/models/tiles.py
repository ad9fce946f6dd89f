"""Products in tiles of equal shape: the numbers of a row do not depend on how many other rows there are.

A matrix library chooses its kernels by the shape of a product, and they round differently. For one shape, the
order of the operations does not depend on the numbers: if equal rows at all places of a tile give equal
results to the bit, the place of a row does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 96  # a multiple of the rows that the kernels of common libraries compute at a time


def tile_len(num_rows: int) -> int:
    """Number of rows to which a product is padded."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def tiled_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """[T, O]: rows times a weight, a tile at a time. T is a multiple of `TILE_ROWS`."""
    out_TO, weight_IO = x_TI.new_empty(len(x_TI), len(weight_OI)), weight_OI.t()
    for rows, out in zip(x_TI.split(TILE_ROWS), out_TO.split(TILE_ROWS), strict=True):
        torch.mm(rows, weight_IO, out=out)
    return out_TO


def ignores_places(weight_OI: Tensor) -> bool:
    """Whether a row's product with a weight is the same to the bit at every place of a tile."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(weight_OI.shape[1], generator=generator).to(weight_OI)
    product = tiled_linear(row.expand(TILE_ROWS, -1).contiguous(), weight_OI)
    return torch.equal(product, product[:1].expand_as(product))
