"""Attention in torch operations that reads only the device part of a layout, as kernels do; calls of SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from remask.workers.attention import sdpa
from remask.workers.attention.varlen import (
    ITS_BLOCK,
    ITS_PAIR,
    AttentionBackend,
    DeviceLayout,
    DeviceShadows,
    VarlenLayout,
)


class DenseAttention(AttentionBackend):
    """One mask over all rows."""

    name = "dense"
    reads_device = True

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        assert layout.device is not None
        seen = _visible(layout.device, len(q_QHd), len(k_TKd))
        k, v = (x.repeat_interleave(q_QHd.shape[1] // x.shape[1], dim=1) for x in (k_TKd, v_TKd))
        scores = torch.einsum("qhd,khd->hqk", q_QHd, k) * q_QHd.shape[2] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture(scope="session")
def dense_attention() -> DenseAttention:
    return DenseAttention()


def _visible(layout: DeviceLayout, num_queries: int, num_keys: int) -> Tensor:
    """Which key each query sees, bool [Q, T]."""
    num_shadows = len(layout.shadows.holes) if layout.shadows is not None else 0
    num_queries, num_keys = num_queries - num_shadows, num_keys - num_shadows
    own, theirs = (
        torch.bucketize(torch.arange(count, device=cu.device), cu[1:], right=True)
        for count, cu in ((num_queries, layout.cu_queries), (num_keys, layout.cu_keys))
    )
    main = own.unsqueeze(1) == theirs
    if layout.shadows is None:
        return main
    hidden = main.new_zeros(num_queries, num_shadows)
    return torch.cat([torch.cat([main, hidden], dim=1), _shadows_see(layout.shadows, num_keys)])


def _shadows_see(shadows: DeviceShadows, num_main: int) -> Tensor:
    """Which main rows, then shadow rows each shadow row sees, bool [S, M + S]; of no tile: only itself."""
    main, own = (torch.arange(size, device=shadows.holes.device) for size in (num_main, len(shadows.holes)))
    first, end, main_first, main_end, block_first, block_end = shadows.tiles.T.unsqueeze(2)
    in_tile = ((own >= first) & (own < end)).float()  # [tiles, S]

    def span(rows: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Which rows [S, rows] the tile of each shadow row spans."""
        return in_tile.T @ ((rows >= start) & (rows < stop)).float() > 0

    holes, in_pair = shadows.holes.unsqueeze(1), (shadows.sees == ITS_PAIR).unsqueeze(1)
    hidden = (main == holes) | ((main == holes - 1) & in_pair)
    sees_main = span(main, main_first, main_end) & ~hidden
    in_block = (shadows.sees == ITS_BLOCK).unsqueeze(1)
    sees_block = span(own, block_first, block_end) & in_block & shadows.is_key
    sees_next = (own == own.unsqueeze(1) + 1) & in_pair
    return torch.cat([sees_main, sees_block | sees_next | (own == own.unsqueeze(1))], dim=1)


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each call of torch's SDPA had."""
    calls: list[int] = []
    attend = sdpa.scaled_dot_product_attention

    def counted(q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        calls.append(len(q))
        return attend(q, *others, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", counted)
    return calls
