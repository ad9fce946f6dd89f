"""Products in fp8: how near they are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from remask import LLM, InvalidRequest
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.fp8 import QUANTIZED, ScaledWeight, linear, quantize_layers
from remask.workers.models.row_ops import EAGER, quantize_rows, triton_ops
from remask.workers.models.transformer import Transformer


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_product_is_that_of_the_rounded_numbers_and_near_the_exact_one() -> None:
    x, w = weight(7, 64) * torch.logspace(-3, 3, 7).unsqueeze(1).bfloat16(), weight(32, 64, seed=1)
    scaled = ScaledWeight(*quantize_rows(w))
    found = linear(x, scaled, EAGER)
    values, scales = quantize_rows(x)
    rounded = (values.double() * scales) @ (scaled.values.double() * scaled.scales).t()
    torch.testing.assert_close(found.double(), rounded, rtol=2**-8, atol=1e-5)
    exact = x.double() @ w.double().t()
    error = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 0.06, "each row has its own scale"
    assert float(error.min()) > 0.001, "and it is rounded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensor_cores_give_the_product_that_the_cpu_gives() -> None:
    x, w = weight(70, 256), weight(96, 256, seed=1)
    expected = linear(x, ScaledWeight(*quantize_rows(w)), EAGER)
    scaled = ScaledWeight(*quantize_rows(w.cuda()))
    for ops in (EAGER, triton_ops()):
        found = linear(x.cuda(), scaled, ops).cpu()
        # Their sums are less exact than fp32.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0.02)
        part = linear(x.cuda(), scaled[16:48], ops).cpu()
        torch.testing.assert_close(part, expected[:, 16:48], rtol=2**-7, atol=0.02)


def test_numbers_keep_three_bits_behind_the_leading_one() -> None:
    x = torch.cat([torch.randn(6, 96), torch.zeros(1, 96)])
    values, scales = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    error = (values.float() * scales - x).abs()
    assert bool((error <= (x.abs() / 16).maximum(scales / 1024) * 1.001).all())


def test_some_outputs_of_a_weight_are_a_weight() -> None:
    x, w = weight(3, 32), weight(48, 32, seed=1)
    scaled = ScaledWeight(*quantize_rows(w))
    whole = linear(x, scaled, EAGER)
    assert torch.equal(linear(x, scaled[16:32], EAGER), whole[:, 16:32])


def test_only_the_layers_products_are_quantized(golden_checkpoint: Path) -> None:
    model = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cpu", quantization="fp8").model
    for layer in model.blocks:
        assert all(isinstance(getattr(layer, name), ScaledWeight) for name in QUANTIZED)
    left = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert left == {"embedding", "head", "attn_norm", "ffn_norm", "final_norm"}


def test_the_embedded_model_still_adds() -> None:
    prompts = ["123+456=", "999+101=", "250+250=", "707+118="]
    params = {"max_tokens": 8, "unmask": "threshold:0.9"}
    with LLM("tiny", device="cpu", dtype="bfloat16", quantization="fp8", max_num_rows=512) as llm:
        written = [output.outputs[0].text for output in llm.generate(prompts, params)]
    assert [text[:4] for text in written] == ["0579", "1100", "0500", "0825"]


def test_what_fp8_does_not_go_with_is_refused_by_name(golden_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="set dtype='bfloat16'") as error:
        LLM(golden_checkpoint, dtype="float32", device="cpu", quantization="fp8", max_num_rows=64)
    assert error.value.parameter == "quantization"
    with pytest.raises(InvalidRequest, match="quantization"):
        LLM(golden_checkpoint, device="cpu", quantization="int4")  # type: ignore[arg-type]


def test_sizes_that_tensor_cores_do_not_take_are_refused(golden_checkpoint: Path) -> None:
    model = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cpu").model
    assert isinstance(model, Transformer)
    model.blocks[0].down = torch.nn.Parameter(model.blocks[0].down[:, :-3].contiguous(), requires_grad=False)
    with pytest.raises(InvalidRequest, match="multiples of 16"):
        quantize_layers(model.blocks)
