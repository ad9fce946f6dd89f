"""The backend on torch's SDPA: a loop over the sequences, faster than a dense mask on CPUs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout


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
        grouped = q_QHd.shape[1] != k_TKd.shape[1]
        out = []
        for run in _runs(layout, batches=self._batches):
            keys = run.first_key, run.num_keys
            parts = ((q_QHd, run.first_query, run.num_queries), (k_TKd, *keys), (v_TKd, *keys))
            q, k, v = (
                x[first : first + run.count * length].unflatten(0, (run.count, length)).transpose(1, 2)
                for x, first, length in parts
            )  # [sequences, heads, rows, d]
            out.append(_rows_first(scaled_dot_product_attention(q, k, v, enable_gqa=grouped)))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_TKd, v_TKd))
        for shadow in layout.segments:
            own = slice(*(layout.cu_queries[-1] + bound for bound in shadow.queries))
            shadow_keys = slice(*(layout.cu_keys[-1] + bound for bound in shadow.keys))
            main = slice(*layout.cu_keys[shadow.sequence : shadow.sequence + 2])
            seen_k, seen_v = (torch.cat([x[:, :, main], x[:, :, shadow_keys]], dim=2) for x in (k, v))
            out.append(
                _rows_first(
                    scaled_dot_product_attention(
                        q[:, :, own], seen_k, seen_v, attn_mask=shadow.mask, enable_gqa=grouped
                    )
                )
            )
        # Rows after the last sequence are padding.
        num_padding = len(q_QHd) - sum(map(len, out))
        if num_padding:
            out.append(q_QHd.new_zeros(num_padding, *q_QHd.shape[1:]))
        return torch.cat(out)


class _Run(NamedTuple):
    """Sequences with equal numbers of queries and keys, whose queries and keys follow each other."""

    num_queries: int
    num_keys: int
    first_query: int
    first_key: int
    count: int


def _runs(layout: VarlenLayout, *, batches: bool) -> list[_Run]:
    keys_of = layout.keys_of or range(len(layout.cu_queries) - 1)
    runs: list[_Run] = []
    for (first, end), own in zip(pairwise(layout.cu_queries), keys_of, strict=True):
        first_key, end_key = layout.cu_keys[own : own + 2]
        lens = end - first, end_key - first_key
        last = runs[-1] if runs else None
        follows = last is not None and last.first_key + last.count * last.num_keys == first_key
        if batches and last and follows and lens == last[:2]:
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(_Run(*lens, first, first_key, 1))
    return runs


def _rows_first(out: Tensor) -> Tensor:
    """[rows, heads, d] of [sequences, heads, rows of each, d]. SDPA writes its output row by row behind a
    transposed view: this is no copy."""
    return out.transpose(1, 2).flatten(0, 1)
