"""Triton kernels against eager torch: what a layer does between products, and attention of shadow rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.workers.attention.varlen import ITS_BLOCK, ITS_PAIR, ITSELF, DeviceShadows, ShadowSpan
from remask.workers.kernels.elementwise import quantize_rows, rms_norm, rotate_halves, silu_mul
from remask.workers.kernels.shadow_attention import shadow_attention
from remask.workers.models import row_ops
from remask.workers.models.transformer import rope_tables

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []  # then they are about what Triton compiles
DTYPES = (
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if HAS_GPU else []),
)  # the interpreter errs in bf16
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    rounding = ROUNDING[found.dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 96), (0, 64), (3, 64)], ids=str)
def test_a_norm_is_that_of_the_transformer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    close(rms_norm(x, weight, 1e-5), row_ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_of_some_heads_of_a_projection_is_that_of_the_transformer(dtype: torch.dtype) -> None:
    heads = random(7, 9, 24, dtype=dtype)[:, 2:7]
    tables = rope_tables(torch.arange(7, device=DEVICE) * 3, 24, 1e4)
    found = rotate_halves(heads, *tables)
    assert found.is_contiguous()
    close(found, row_ops.rotate_halves(heads, *tables))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_is_rounded_before_its_product(dtype: torch.dtype) -> None:
    both = random(5, 2 * 70, dtype=dtype) * 3
    close(silu_mul(both), row_ops.silu_mul(both))


def test_a_quantized_row_has_its_largest_number_at_the_end_of_the_scale() -> None:
    x = random(6, 96) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1e4], [7.0]], device=DEVICE)
    values, scales = quantize_rows(x)
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (6, 1))
    torch.testing.assert_close(scales, x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448)
    assert values.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448, 448]
    # fp8 keeps three bits behind the leading one: the error is at most 1/8 of the number, or one step.
    # Triton's interpreter truncates, and loses the carry if it should round up to a power of two.
    error = (values.float() * scales - x).abs()
    assert float((error <= (x.abs() / 8).maximum(scales / 512) * 1.001).float().mean()) > 0.95
    if HAS_GPU:
        assert torch.equal(values.view(torch.uint8), row_ops.quantize_rows(x)[0].view(torch.uint8))


@pytest.mark.parametrize("sees", [(ITS_BLOCK, ITS_BLOCK), (ITS_PAIR, ITSELF)], ids=["block", "pairs"])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shadow_rows_see_what_a_dense_mask_says(
    dtype: torch.dtype, head_dim: int, sees: tuple[int, int]
) -> None:
    # Sequences of 70, 1 and 9 main rows with 40, 3 and no shadow rows, and two rows of no tile.
    tiles = [(0, 32, 0, 70, 0, 40), (32, 40, 0, 70, 0, 40), (0, 0, 0, 0, 0, 0), (40, 43, 70, 71, 40, 43)]
    holes = [*range(3, 43), 70, 70, 70, 0, 0]
    generator = torch.Generator().manual_seed(3)
    shadows = DeviceShadows(
        tiles=torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
        holes=torch.tensor(holes, dtype=torch.int32, device=DEVICE),
        is_key=(torch.rand(45, generator=generator) < 0.7).to(DEVICE),
        sees=torch.tensor([*sees * 20, *[ITSELF] * 5], dtype=torch.int8, device=DEVICE),
        spans=(ShadowSpan(0, 0, 70, 0, 40, sees[0]), ShadowSpan(1, 70, 71, 40, 43, ITSELF)),
    )
    q = random(80 + 45, 4, head_dim, dtype=dtype)
    k, v = random(80 + 45, 6, head_dim, dtype=dtype, seed=1)[:, :4].split(2, dim=1)
    found = shadow_attention(q[80:], k[:80], v[:80], k[80:], v[80:], shadows)
    for segment, main in zip(shadows.segments, (slice(0, 70), slice(70, 71)), strict=True):
        own = slice(*segment.keys)
        queries, keys, values = (
            x.float().transpose(0, 1)
            for x in (q[80:][own], torch.cat([k[main], k[80:][own]]), torch.cat([v[main], v[80:][own]]))
        )
        dense = scaled_dot_product_attention(queries, keys, values, attn_mask=segment.mask, enable_gqa=True)
        close(found[own], dense.transpose(0, 1).to(dtype))
    assert not found[43:].any(), "no row asked for it"
    alone = shadow_attention(q[120:123], k[70:71], v[70:71], k[120:123], v[120:123], only(shadows))
    assert torch.equal(alone, found[40:43]), "the rows beside them change no bit"


def only(shadows: DeviceShadows) -> DeviceShadows:
    """The second sequence's shadow rows by themselves."""
    tiles = torch.tensor([(0, 3, 0, 1, 0, 3)], dtype=torch.int32, device=DEVICE)
    own = slice(40, 43)
    return DeviceShadows(tiles, shadows.holes[own] - 70, shadows.is_key[own], shadows.sees[own], ())
