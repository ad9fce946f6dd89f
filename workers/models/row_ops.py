"""The row operations of a transformer, its matrix products, and those of its experts.

`EAGER` is the reference and runs everywhere. `TILED` multiplies in tiles. `triton_ops` computes each of the
others in one launch, and the experts in two products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from remask.workers.models.tiles import tiled_linear

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
_SMALLEST_AMAX = 1e-12  # gives rows of zeros a scale
_EXPERT_ROWS = 512  # whose copies stay in the cache of a CPU


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalises in fp32, casts back, then multiplies."""
    x32 = x_TD.float()
    normed_TD = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)
    return normed_TD.mul_(weight_D)


def rotate_halves(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head's first half against its second (NeoX layout), in fp32."""
    x32, half = x_THd.float(), x_THd.shape[-1] // 2
    out = x32 * cos
    out[..., :half].addcmul_(x32[..., half:], sin[..., half:], value=-1)
    out[..., half:].addcmul_(x32[..., :half], sin[..., :half])
    return out.to(x_THd.dtype)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """[T, F]: SiLU of the first halves of rows [T, 2F], times the second."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_anywhere(gate_up_T2F: Tensor) -> Tensor:
    """`silu_mul`, whose bits do not depend on the number of rows: torch's SiLU computes the last elements of
    each thread's part by another formula."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    out = gate.neg().exp_().add_(1)
    return torch.div(gate, out, out=out).mul_(up)


def quantize_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 with one scale a row.

    Returns:
        e4m3 [T, D] and fp32 [T, 1], whose product is nearly `x_TD`: a row's largest magnitude becomes 448.
    """
    x32 = x_TD.float()
    # A product: a GPU divides by a host scalar as by its reciprocal, and a CPU does not.
    scales_T1 = x32.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_AMAX) * (1 / _FP8_MAX)
    return (x32 / scales_T1).clamp(-_FP8_MAX, _FP8_MAX).to(FP8), scales_T1


def experts(
    x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighted sum of the outputs of each row's experts, one product for each expert that has rows.

    Args:
        x_TD: rows.
        weights_TK: of the experts of each row.
        chosen_TK: int64, their indices.
        gate_up_E2FD, down_EDF: the weights of all experts.
    """
    num_active, out_TD = chosen_TK.shape[1], torch.zeros_like(x_TD)
    for part in torch.arange(len(x_TD), device=x_TD.device).split(_EXPERT_ROWS):
        flat = chosen_TK[part].flatten()
        order = flat.argsort(stable=True)
        rows, weights = part[order // num_active], weights_TK[part].flatten()[order].unsqueeze(1)
        start = 0
        for expert, count in enumerate(torch.bincount(flat, minlength=len(down_EDF)).tolist()):
            if count:
                own = slice(start, start + count)
                start += count
                hidden = silu_mul(F.linear(x_TD[rows[own]], gate_up_E2FD[expert]))
                out_TD.index_add_(0, rows[own], F.linear(hidden, down_EDF[expert]).mul_(weights[own]))
    return out_TD


class RowOps(NamedTuple):
    """One implementation of the row operations."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate_halves: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear


EAGER = RowOps(rms_norm, rotate_halves, silu_mul, quantize_rows, experts)
TILED = EAGER._replace(linear=tiled_linear, silu_mul=silu_mul_anywhere)


def triton_ops() -> RowOps:
    """The implementation in Triton."""
    from remask.workers.kernels import elementwise as kernels
    from remask.workers.kernels.experts import experts

    return RowOps(kernels.rms_norm, kernels.rotate_halves, kernels.silu_mul, kernels.quantize_rows, experts)
