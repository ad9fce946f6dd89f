"""The backend on torch's SDPA: a loop over the sequences, faster than a dense mask on CPUs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout


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
        for shadow in layout.segments:
            own = slice(*(layout.cu_queries[-1] + bound for bound in shadow.queries))
            shadow_keys = slice(*(layout.cu_keys[-1] + bound for bound in shadow.keys))
            main = keys[shadow.sequence]
            seen_k, seen_v = (torch.cat([x[:, :, main], x[:, :, shadow_keys]], dim=2) for x in (k, v))
            out.append(
                scaled_dot_product_attention(
                    q[:, :, own], seen_k, seen_v, attn_mask=shadow.mask, enable_gqa=grouped
                )
            )
        # Rows after the last sequence are padding.
        num_padding = len(q_QHd) - sum(part.shape[2] for part in out)
        if num_padding:
            out.append(q.new_zeros(1, q.shape[1], num_padding, q.shape[3]))
        # SDPA writes its output row by row behind a transposed view; joined in that order it is copied once.
        return torch.cat([part.transpose(1, 2).squeeze(0) for part in out])
