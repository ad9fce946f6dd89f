"""The backend on torch's SDPA: a loop over the sequences, which beats a dense mask on CPUs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import AttentionBackend, DeviceShadows, VarlenLayout


class SdpaAttention(AttentionBackend):
    """Exact on every device; made for CPUs."""

    name = "sdpa"

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_TKd, v_TKd))  # [1, heads, rows, d]
        grouped = q.shape[1] != k.shape[1]
        queries = [slice(*bounds) for bounds in pairwise(layout.cu_queries)]
        keys = [slice(*bounds) for bounds in pairwise(layout.cu_keys)]
        out = [
            scaled_dot_product_attention(q[:, :, own], k[:, :, seen], v[:, :, seen], enable_gqa=grouped)
            for own, seen in zip(queries, keys, strict=True)
        ]
        for shadow in layout.shadows:
            own = slice(*(layout.cu_queries[-1] + bound for bound in shadow.queries))
            shadow_keys = slice(*(layout.cu_keys[-1] + bound for bound in shadow.keys))
            main = keys[shadow.sequence]
            seen_k, seen_v = (torch.cat([x[:, :, main], x[:, :, shadow_keys]], dim=2) for x in (k, v))
            out.append(
                scaled_dot_product_attention(
                    q[:, :, own], seen_k, seen_v, attn_mask=shadow.mask, enable_gqa=grouped
                )
            )
        shadows = layout.device.shadows if layout.device is not None else None
        num_shadows = len(shadows.holes) if shadows is not None else 0
        num_rows, num_main = q.shape[2] - num_shadows, layout.cu_queries[-1]
        if not layout.shadows:  # rows of no sequence
            out.append(torch.zeros_like(q[:, :, num_main:num_rows]))
        if shadows is not None:
            mask = _mask(shadows, k.shape[2] - num_shadows)
            out.append(
                scaled_dot_product_attention(q[:, :, num_rows:], k, v, attn_mask=mask, enable_gqa=grouped)
            )
        # SDPA writes its output row by row behind a transposed view; joined in that order it is copied once.
        return torch.cat([part.transpose(1, 2).squeeze(0) for part in out])


def _mask(shadows: DeviceShadows, num_main: int) -> Tensor:
    """Which of all rows each shadow row sees, bool [S, M + S], for the few that a test or a study has."""
    main, own = (torch.arange(n, device=shadows.holes.device) for n in (num_main, len(shadows.holes)))
    first, end, main_first, main_end, block_first, block_end = shadows.tiles.T.unsqueeze(2)
    in_tile = ((own >= first) & (own < end)).float()  # [tiles, S]

    def span(rows: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Which rows [S, rows] the tile of each shadow row spans."""
        return in_tile.T @ ((rows >= start) & (rows < stop)).float() > 0

    sees_main = span(main, main_first, main_end) & (main != shadows.holes.unsqueeze(1))
    sees_block = span(own, block_first, block_end) & shadows.sees_block.unsqueeze(1) & shadows.is_key
    return torch.cat([sees_main, sees_block | (own == own.unsqueeze(1))], dim=1)
