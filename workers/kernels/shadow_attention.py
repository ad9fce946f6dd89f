"""Attention of the shadow rows of a pack with static shapes. The kernel computes the mask from data.

Variable-length kernels of libraries compute the main rows. Their masks cannot exclude one key for each query,
as shadow rows need. Each tile of shadow rows iterates over the main rows of its sequence and then over the
sequence's shadow rows, with one online softmax (Milakov and Gimelshein 2018). The host reads nothing.

Key tiles start at the sequence's own first row, so a row's bits do not depend on other sequences.
"""

# Kernels are launched with what the annotations of Triton's functions do not say.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from remask.workers.attention.varlen import ITS_BLOCK, ITS_PAIR, SHADOW_TILE, DeviceShadows
from remask.workers.kernels.sizes import attention_sizes


def shadow_attention(
    q_SHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    k_shadow_SKd: Tensor,
    v_shadow_SKd: Tensor,
    shadows: DeviceShadows,
) -> Tensor:
    """Attention output of all shadow rows; zeros for rows that are in no tile.

    All tensors may be views with a contiguous last dimension.

    Args:
        q_SHd: queries of the S shadow rows, [S, H, d].
        k_MKd, v_MKd: keys and values of the main rows, [M, K, d] (H a multiple of K).
        k_shadow_SKd, v_shadow_SKd: keys and values of the shadow rows, [S, K, d].
        shadows: visibility of the shadow rows.

    Returns:
        [S, H, d], contiguous.
    """
    num_heads, head_dim = q_SHd.shape[1:]
    out_SHd = torch.zeros(q_SHd.shape, dtype=q_SHd.dtype, device=q_SHd.device)
    sizes = attention_sizes(is_fp32=q_SHd.dtype == torch.float32)
    _attend[(shadows.tiles.shape[0], num_heads)](
        q_SHd,
        k_MKd,
        v_MKd,
        k_shadow_SKd,
        v_shadow_SKd,
        out_SHd,
        shadows.tiles,
        shadows.holes,
        shadows.is_key,
        shadows.sees,
        *(stride for x in (q_SHd, k_MKd, v_MKd, k_shadow_SKd, v_shadow_SKd) for stride in x.stride()[:2]),
        num_heads,
        num_heads // k_MKd.shape[1],
        head_dim,
        head_dim**-0.5 / math.log(2),
        SHARED=ITS_BLOCK,
        PAIR=ITS_PAIR,
        QUERIES=SHADOW_TILE,
        KEYS=sizes.keys,
        BLOCK=max(16, triton.next_power_of_2(head_dim)),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return out_SHd


@triton.jit
def _rows(ptr, rows, stride, is_row, dims, head_dim):
    """[rows, dims] of one head; zeros outside."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(ptrs, mask=is_row[:, None] & (dims < head_dim)[None, :], other=0.0)


@triton.jit
def _absorb(acc, top, norm, q, k, v, seen, scale):
    """Adds a tile of keys to the sum of values, the largest score and the sum of weights."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, norm * shrink + tl.sum(weights, 1)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_shadow_ptr,
    v_shadow_ptr,
    out_ptr,
    tiles_ptr,
    holes_ptr,
    is_key_ptr,
    sees_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    k_shadow_stride,
    k_shadow_head_stride,
    v_shadow_stride,
    v_shadow_head_stride,
    num_heads,
    group_size,
    head_dim,
    scale,
    SHARED: tl.constexpr,
    PAIR: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 6
    first, end = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    if first >= end:
        return
    main_first, main_end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    shadow_first, shadow_end = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group_size
    k_ptr = k_ptr + kv_head * k_head_stride
    v_ptr = v_ptr + kv_head * v_head_stride
    k_shadow_ptr = k_shadow_ptr + kv_head * k_shadow_head_stride
    v_shadow_ptr = v_shadow_ptr + kv_head * v_shadow_head_stride
    dims = tl.arange(0, BLOCK)
    queries = first + tl.arange(0, QUERIES)
    is_query = queries < end
    q = _rows(q_ptr + head * q_head_stride, queries, q_stride, is_query, dims, head_dim)
    holes = tl.load(holes_ptr + queries, mask=is_query, other=-1)
    sees = tl.load(sees_ptr + queries, mask=is_query, other=0)
    in_pair, in_block = sees == PAIR, sees == SHARED

    acc = tl.zeros([QUERIES, BLOCK], dtype=tl.float32)
    norm = tl.zeros([QUERIES], dtype=tl.float32)
    # Finite, unlike masked scores: a tile that is masked for a row then has weight 0 instead of NaN.
    top = tl.full([QUERIES], -1e38, dtype=tl.float32)
    for start in range(main_first, main_end, KEYS):
        keys = start + tl.arange(0, KEYS)
        is_row = keys < main_end
        k = _rows(k_ptr, keys, k_stride, is_row, dims, head_dim)
        v = _rows(v_ptr, keys, v_stride, is_row, dims, head_dim)
        hidden = (keys[None, :] == holes[:, None]) | (
            (keys[None, :] == holes[:, None] - 1) & in_pair[:, None]
        )
        seen = is_row[None, :] & ~hidden
        acc, top, norm = _absorb(acc, top, norm, q, k, v, seen, scale)
    for start in range(shadow_first, shadow_end, KEYS):
        keys = start + tl.arange(0, KEYS)
        is_row = keys < shadow_end
        k = _rows(k_shadow_ptr, keys, k_shadow_stride, is_row, dims, head_dim)
        v = _rows(v_shadow_ptr, keys, v_shadow_stride, is_row, dims, head_dim)
        is_key = tl.load(is_key_ptr + keys, mask=is_row, other=0)
        seen = is_row[None, :] & (
            (keys[None, :] == queries[:, None])
            | (in_block[:, None] & (is_key != 0)[None, :])
            | (in_pair[:, None] & (keys[None, :] == queries[:, None] + 1))
        )
        acc, top, norm = _absorb(acc, top, norm, q, k, v, seen, scale)

    out_ptrs = out_ptr + (queries.to(tl.int64)[:, None] * num_heads + head) * head_dim + dims[None, :]
    inside = is_query[:, None] & (dims < head_dim)[None, :]
    tl.store(out_ptrs, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
