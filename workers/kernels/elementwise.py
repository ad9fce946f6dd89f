"""The row operations of a layer, each in one launch and one pass over memory.

The same arithmetic as the eager functions of `remask.workers.models.row_ops`, and the same roundings: the
numbers are fp32 and are rounded to the rows' dtype wherever eager torch would store them. A row is worked on
by itself, so it never depends on those beside it. Rows may be views; their last dimension is contiguous.
"""

# Kernels are launched with what the annotations of Triton's functions do not say.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remask.workers.models.row_ops import FP8

_FP8_MAX = tl.constexpr(448.0)
_FP8_MAX_INVERSE = tl.constexpr(1 / 448.0)
_SMALLEST_AMAX = tl.constexpr(1e-12)  # gives rows of zeros a scale
_COLUMNS = 2048  # of a program, where a row is cut up
_HEADS = 16  # of a program


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `row_ops.rms_norm`, of rows [T, D] and weights [D] of one dtype; a row is one block."""
    (num_rows, num_columns), out = x_TD.shape, x_TD.new_empty(x_TD.shape)
    block = triton.next_power_of_2(num_columns)
    _rms_norm[(num_rows,)](
        x_TD, weight_D, out, x_TD.stride(0), num_columns, eps, BLOCK=block, num_warps=_warps(block)
    )
    return out


def rotate_halves(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `row_ops.rotate_halves`, of rows [T, H, d] of heads.

    Args:
        x_THd: may be some heads of a wider projection.
        cos, sin: fp32 [T, 1, d] from `rope_tables`; only the first halves are read: the second repeat them.
    """
    (num_rows, num_heads, head_dim), out = x_THd.shape, x_THd.new_empty(x_THd.shape)
    _rotate_halves[(num_rows, triton.cdiv(num_heads, _HEADS))](
        x_THd,
        cos,
        sin,
        out,
        x_THd.stride(0),
        x_THd.stride(1),
        cos.stride(0),
        sin.stride(0),
        num_heads,
        head_dim // 2,
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(head_dim // 2),
    )
    return out


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """As `row_ops.silu_mul`."""
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = gate_up_T2F.new_empty(num_rows, width)
    _silu_mul[(num_rows, triton.cdiv(width, _COLUMNS))](
        gate_up_T2F, out, gate_up_T2F.stride(0), width, BLOCK=_COLUMNS
    )
    return out


def quantize_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """As `row_ops.quantize_rows`; a row is one block."""
    num_rows, num_columns = x_TD.shape
    values_TD = x_TD.new_empty(x_TD.shape, dtype=FP8)
    scales_T1 = x_TD.new_empty(num_rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(num_columns)
    _quantize_rows[(num_rows,)](
        x_TD, values_TD, scales_T1, x_TD.stride(0), num_columns, BLOCK=block, num_warps=_warps(block)
    )
    return values_TD, scales_T1


def _warps(block: int) -> int:
    """32 numbers a thread up to rows of 16384: four loads of 16 bytes in fp16."""
    return min(max(block // 1024, 1), 16)


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, row_stride, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)).to(dtype)
    # The product of two fp16 or bf16 numbers is exact in fp32: this rounds once, as a product in dtype does.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = (normed.to(tl.float32) * weight).to(dtype)
    tl.store(out_ptr + row * num_columns + columns, out, mask=inside)


@triton.jit
def _rotate_halves(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    row_stride,
    head_stride,
    cos_stride,
    sin_stride,
    num_heads,
    half,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < half)
    x_ptrs = x_ptr + row * row_stride + heads * head_stride + columns
    first = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * cos_stride + columns, mask=columns < half, other=0.0)
    sin = tl.load(sin_ptr + row * sin_stride + columns, mask=columns < half, other=0.0)
    dtype = out_ptr.dtype.element_ty
    out_ptrs = out_ptr + (row * num_heads + heads) * (2 * half) + columns
    tl.store(out_ptrs, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptrs + half, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _silu_mul(x_ptr, out_ptr, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x_ptrs = x_ptr + row * row_stride + columns
    gate = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + width, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    tl.store(out_ptr + row * width + columns, (silu.to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit
def _quantize_rows(x_ptr, values_ptr, scales_ptr, row_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # An exact division: that of `/` is off by up to two bits, and torch would round some numbers differently.
    scale = tl.maximum(tl.max(tl.abs(x), 0), _SMALLEST_AMAX) * _FP8_MAX_INVERSE
    values = tl.clamp(tl.div_rn(x, scale), -_FP8_MAX, _FP8_MAX)
    tl.store(values_ptr + row * num_columns + columns, values.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)
