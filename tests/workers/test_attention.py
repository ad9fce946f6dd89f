"""The SDPA backend against dense masked attention in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import ShadowSegment, VarlenLayout

LENS, SHADOWS = (7, 1, 12, 5), {0: 3, 2: 4}  # main rows of each sequence; shadow rows by sequence


def hole_masks() -> list[tuple[int, Tensor]]:
    masks = []
    for sequence, count in SHADOWS.items():
        main = torch.ones(count, LENS[sequence], dtype=torch.bool)
        main[range(count), range(count)] = False
        masks.append((sequence, torch.cat([main, torch.ones(count, count, dtype=torch.bool)], dim=1)))
    return masks


def layout(cu_queries: tuple[int, ...], cu_keys: tuple[int, ...], skipped: int = 0) -> VarlenLayout:
    """The first `skipped` shadow rows of each sequence are keys only."""
    shadows, query, key = [], 0, 0
    for sequence, mask in hole_masks():
        queries, keys = (query, query + len(mask) - skipped), (key, key + len(mask))
        shadows.append(ShadowSegment(sequence, queries, keys, mask[skipped:]))
        query, key = queries[1], keys[1]
    return VarlenLayout(cu_queries, cu_keys, tuple(shadows))


def visible(cu: tuple[int, ...], total: int) -> Tensor:
    """Dense visibility [T, T] of the whole pack."""
    seen = torch.zeros(total, total, dtype=torch.bool)
    for start, end in itertools.pairwise(cu):
        seen[start:end, start:end] = True
    row = cu[-1]
    for sequence, mask in hole_masks():
        count = len(mask)
        seen[row : row + count, cu[sequence] : cu[sequence + 1]] = mask[:, : LENS[sequence]]
        seen[row : row + count, row : row + count] = mask[:, LENS[sequence] :]
        row += count
    return seen


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("pruned", [False, True])
def test_packed_attention_equals_dense_masked_attention(heads: int, kv_heads: int, pruned: bool) -> None:
    torch.manual_seed(0)
    cu = (0, 7, 8, 20, 25)
    total = cu[-1] + sum(SHADOWS.values())
    q, k, v = (torch.randn(total, n, 8) for n in (heads, kv_heads, kv_heads))
    queries = torch.arange(total)
    cu_queries = cu
    if pruned:  # two rows of each sequence (one of the shortest), then all shadow rows but each first
        queries = torch.tensor([1, 4, 7, 10, 19, 20, 24, 26, 27, 29, 30, 31])
        cu_queries = (0, 2, 3, 5, 7)
    got = SdpaAttention().attend(q[queries], k, v, layout(cu_queries, cu, skipped=int(pruned)))
    scores = (
        torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(heads // kv_heads, 1).double()) / 8**0.5
    )
    weights = scores.masked_fill(~visible(cu, total), -torch.inf).softmax(-1)
    dense = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(heads // kv_heads, 1).double())
    torch.testing.assert_close(got.double(), dense[queries], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batches", [True, False])
def test_sequences_of_equal_length_share_calls_and_may_share_keys(
    batches: bool, sdpa_calls: list[int]
) -> None:
    torch.manual_seed(0)
    cu_queries, cu_keys, keys_of = (0, 2, 4, 6, 9, 9, 11), (0, 5, 10, 14), (0, 1, 1, 2, 0, 0)
    q, k, v = torch.randn(12, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    own = VarlenLayout(cu_queries, cu_keys, (), keys_of=keys_of)
    got = SdpaAttention(batches=batches).attend(q, k, v, own)
    assert sdpa_calls == ([2, 1, 1, 1, 1] if batches else [1] * 6)
    for (first, end), keys in zip(itertools.pairwise(cu_queries), keys_of, strict=True):
        seen = slice(*cu_keys[keys : keys + 2])
        own_k, own_v = (x[seen].repeat_interleave(2, 1).double() for x in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q[first:end].double(), own_k) / 8**0.5).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, own_v)
        torch.testing.assert_close(got[first:end].double(), expected, rtol=1e-5, atol=1e-5)
    assert not got[11:].any(), "the last row is padding"
