"""The backend on torch's SDPA: a loop over the sequences, faster than a dense mask on CPUs."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout

Pair: TypeAlias = tuple[Tensor, Tensor]  # keys and values


class SdpaAttention(AttentionBackend):
    """Exact on every device; made for CPUs.

    Args:
        batches: whether sequences of equal length share a call. With many threads torch rounds such a call
            in bf16 otherwise than one of a single sequence.
    """

    name = "sdpa"

    def __init__(self, *, batches: bool = True) -> None:
        self._batches = batches

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        return self._attend(q_QHd, (k_TKd, v_TKd), (k_TKd, v_TKd), layout)

    def attend_kept(
        self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout, kept_2NKd: Tensor
    ) -> Tensor:
        return self._attend(q_QHd, (k_TKd, v_TKd), (kept_2NKd[0], kept_2NKd[1]), layout)

    def _attend(self, q_QHd: Tensor, packed: Pair, kept: Pair, layout: VarlenLayout) -> Tensor:
        """`attend` over the pack's own keys and values, and the kept ones."""
        (k_TKd, _), sources = packed, (packed, kept)
        grouped = q_QHd.shape[1] != k_TKd.shape[1]
        runs = layout.runs if self._batches else layout.sequences
        out: list[Tensor] = []
        for first_query, num_queries, first_key, num_keys, are_kept, count in runs:
            q = _sequences(q_QHd, first_query, num_queries, count)
            k, v = (_sequences(x, first_key, num_keys, count) for x in sources[are_kept])
            out.append(_rows_first(scaled_dot_product_attention(q, k, v, enable_gqa=grouped)))
        shadows = layout.segments
        for shadow in shadows:
            own = slice(*(layout.cu_queries[-1] + bound for bound in shadow.queries))
            shadow_keys = slice(*(layout.cu_keys[-1] + bound for bound in shadow.keys))
            first_key, end_key, are_kept = layout.keys(shadow.sequence)
            seen_k, seen_v = (
                _heads_first(torch.cat([x[first_key:end_key], fresh[shadow_keys]]))
                for x, fresh in zip(sources[are_kept], packed, strict=True)
            )
            q = _heads_first(q_QHd[own])
            seen = scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=shadow.mask, enable_gqa=grouped)
            out.append(_rows_first(seen))
        # Rows after the last sequence are padding.
        num_padding = len(q_QHd) - layout.cu_queries[-1] - (shadows[-1].queries[1] if shadows else 0)
        if num_padding:
            out.append(q_QHd.new_zeros(num_padding, *q_QHd.shape[1:]))
        return torch.cat(out)


def _sequences(x_RHd: Tensor, first: int, length: int, count: int) -> Tensor:
    """The sequences of equal length from row `first` on, [count, heads, length, d]; a view made by one call,
    because a pack may have many sequences."""
    rows, heads, last = x_RHd.stride()
    size = count, x_RHd.shape[1], length, x_RHd.shape[2]
    return x_RHd.as_strided(size, (length * rows, heads, rows, last), x_RHd.storage_offset() + first * rows)


def _heads_first(x_RHd: Tensor) -> Tensor:
    """[1, heads, rows, d] of the rows of one sequence."""
    return x_RHd.transpose(0, 1).unsqueeze(0)


def _rows_first(out: Tensor) -> Tensor:
    """[rows, heads, d] of [sequences, heads, rows of each, d]. SDPA writes its output row by row behind a
    transposed view: this is no copy."""
    return out.transpose(1, 2).flatten(0, 1)
