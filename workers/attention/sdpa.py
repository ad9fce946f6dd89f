"""The backend on torch's SDPA: a loop over the sequences, which beats a dense mask on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout


class SdpaAttention(AttentionBackend):
    """Exact on every device; made for CPUs."""

    name = "sdpa"

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_TKd, v_TKd))  # [1, heads, T, d]
        grouped = q.shape[1] != k.shape[1]
        out = []
        for start, end in zip(layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True):
            rows = slice(start, end)
            out.append(
                scaled_dot_product_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], enable_gqa=grouped)
            )
        for shadow in layout.shadows:
            main, own = slice(shadow.main_start, shadow.main_end), slice(shadow.start, shadow.end)
            keys, values = (torch.cat([x[:, :, main], x[:, :, own]], dim=2) for x in (k, v))
            out.append(
                scaled_dot_product_attention(
                    q[:, :, own], keys, values, attn_mask=shadow.mask, enable_gqa=grouped
                )
            )
        return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)
