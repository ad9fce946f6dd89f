"""The experts of a layer as two grouped products, whose shapes do not depend on the routes.

The pairs of a row and one of its experts are sorted by expert and cut into tiles of one expert. Where the
tiles of an expert begin is on the device, so the host waits for nothing and a CUDA graph may hold the layer.
There are as many programs as any routes need; those behind the last tile return at once.

`remask.workers.models.row_ops.experts` is the reference. Products are summed in fp32 and rounded where the
reference rounds; the outputs of a row's experts are added in fp32. A row's numbers do not depend on the other
rows or on their routes.
"""

# Inside kernels Triton's functions take and give what their annotations do not say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remask.workers.kernels.elementwise import silu_mul
from remask.workers.kernels.sizes import expert_sizes


def experts(
    x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `row_ops.experts`."""
    num_active = chosen_TK.shape[1]
    sorted_P, pairs_P = chosen_TK.flatten().sort(stable=True)
    each = torch.arange(len(gate_up_E2FD), device=x_TD.device)
    ends_E = torch.searchsorted(sorted_P, each, right=True)
    gate_up_P2F = x_TD.new_empty(len(pairs_P), gate_up_E2FD.shape[1])
    _multiply(x_TD, gate_up_E2FD, gate_up_P2F, weights_TK, pairs_P, ends_E, num_active, first=True)
    out_PD = x_TD.new_empty(len(pairs_P), x_TD.shape[1])
    _multiply(silu_mul(gate_up_P2F), down_EDF, out_PD, weights_TK, pairs_P, ends_E, num_active, first=False)
    return out_PD.unflatten(0, chosen_TK.shape).sum(1)


def _multiply(
    x: Tensor,
    weights_EOI: Tensor,
    out: Tensor,
    shares_TK: Tensor,
    pairs_P: Tensor,
    ends_E: Tensor,
    num_active: int,
    *,
    first: bool,
) -> None:
    """One product of each pair with its expert's weights.

    Args:
        x, out: the first product reads rows and writes pairs in the order of the experts; the second reads
            those, and writes pairs in the order of the rows, times their shares.
        weights_EOI: of all experts.
        shares_TK: what each expert adds to a row.
        pairs_P: numbers of the pairs (row * K + place of the expert), sorted by expert.
        ends_E: the number of pairs of an expert and of those before it.
        num_active: K.
        first: which product.
    """
    (num_experts, num_outputs, depth), num_pairs = weights_EOI.shape, len(pairs_P)
    if num_pairs == 0:
        return
    sizes = expert_sizes(is_fp32=x.dtype == torch.float32)
    num_tiles = triton.cdiv(num_pairs, sizes.tile_pairs) + min(num_experts, num_pairs) - 1
    # Programs that start together share an expert's rows; its weights then come from the second-level cache.
    _grouped_product[(triton.cdiv(num_outputs, sizes.tile_outputs), num_tiles)](
        x,
        weights_EOI,
        out,
        shares_TK,
        pairs_P,
        ends_E,
        x.stride(0),
        num_experts,
        num_active,
        num_outputs,
        depth,
        FIRST=first,
        EXPERTS=triton.next_power_of_2(num_experts),
        TILE_P=sizes.tile_pairs,
        TILE_O=sizes.tile_outputs,
        TILE_I=sizes.tile_bytes // x.element_size(),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )


@triton.jit
def _grouped_product(
    x_ptr,
    weights_ptr,
    out_ptr,
    shares_ptr,
    pairs_ptr,
    ends_ptr,
    x_stride,
    num_experts,
    num_active,
    num_outputs,
    depth,
    FIRST: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
):
    tile = tl.program_id(1)
    each = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + each, mask=each < num_experts, other=0)
    starts = tl.load(ends_ptr + each - 1, mask=(each > 0) & (each < num_experts), other=0)
    tile_ends = tl.cumsum((ends - starts + TILE_P - 1) // TILE_P, 0)
    # Programs behind the last tile find as many experts before them as there are.
    expert = tl.sum(((tile_ends <= tile) & (each < num_experts)).to(tl.int32), 0)
    if expert < num_experts:
        is_own = each == expert
        start, end = tl.sum(tl.where(is_own, starts, 0), 0), tl.sum(tl.where(is_own, ends, 0), 0)
        tile_end = tl.sum(tl.where(is_own, tile_ends, 0), 0)
        first_tile = tile_end - (end - start + TILE_P - 1) // TILE_P
        places = start + (tile - first_tile) * TILE_P + tl.arange(0, TILE_P)
        is_pair = places < end
        pairs = tl.load(pairs_ptr + places, mask=is_pair, other=0)
        outputs = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
        is_output = outputs < num_outputs
        x_rows = pairs // num_active if FIRST else places
        x_ptrs = x_ptr + x_rows.to(tl.int64) * x_stride
        weight_ptrs = weights_ptr + (expert.to(tl.int64) * num_outputs + outputs) * depth
        total = tl.zeros((TILE_P, TILE_O), tl.float32)
        for begin in range(0, depth, TILE_I):
            dims = begin + tl.arange(0, TILE_I)
            inside = dims < depth
            x = tl.load(x_ptrs[:, None] + dims[None, :], mask=is_pair[:, None] & inside[None, :], other=0.0)
            weight_mask = is_output[None, :] & inside[:, None]
            weight = tl.load(weight_ptrs[None, :] + dims[:, None], mask=weight_mask, other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
        dtype = out_ptr.dtype.element_ty
        out = total.to(dtype)
        if not FIRST:
            shares = tl.load(shares_ptr + pairs, mask=is_pair, other=0.0).to(tl.float32)
            out = (out.to(tl.float32) * shares[:, None]).to(dtype)
        out_rows = (places if FIRST else pairs).to(tl.int64)
        out_ptrs = out_ptr + out_rows[:, None] * num_outputs + outputs[None, :]
        tl.store(out_ptrs, out, mask=is_pair[:, None] & is_output[None, :])
