"""Products in fp8: one scale for each output of a weight and each row of activations, sums in fp32.

On GPUs with fp8 (Hopper, Ada, Blackwell) it has twice the arithmetic rate and half the bytes of bf16.
Embedding, norms and head stay in bf16. A CPU multiplies the same numbers in fp32: this serves to study
quality and is no faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remask.scheduler.errors import InvalidRequest
from remask.workers.models import row_ops
from remask.workers.models.row_ops import RowOps

QUANTIZED = ("qkv", "attn_out", "gate_up", "down")  # of each layer
_MULTIPLE = 16  # that both sizes of a weight must be of, for the tensor cores


@dataclass(frozen=True)
class ScaledWeight:
    """A weight [O, I] in fp8.

    Attributes:
        values: e4m3 [O, I].
        scales: fp32 [O, 1].
    """

    values: Tensor
    scales: Tensor

    def __getitem__(self, outputs: slice) -> ScaledWeight:
        """Some of the outputs."""
        return ScaledWeight(self.values[outputs], self.scales[outputs])


def quantize_layers(layers: nn.ModuleList) -> None:
    """Replaces the weights of layers by fp8, one at a time.

    Raises:
        InvalidRequest: dtype, sizes or device do not support fp8.
    """
    for layer in layers:
        for name in QUANTIZED:
            weight = getattr(layer, name)
            _check(weight)
            delattr(layer, name)  # an attribute registered as a parameter takes nothing else
            setattr(layer, name, ScaledWeight(*row_ops.quantize_rows(weight)))


def linear(x_TI: Tensor, weight: Tensor | ScaledWeight, ops: RowOps) -> Tensor:
    """[T, O]: rows times a weight."""
    if isinstance(weight, Tensor):
        return ops.linear(x_TI, weight)
    values_TI, scales_T1 = ops.quantize_rows(x_TI)
    if x_TI.is_cuda:
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            values_TI,
            weight.values.t(),
            scale_a=scales_T1,
            scale_b=weight.scales.t(),
            out_dtype=x_TI.dtype,
            use_fast_accum=True,
        )
    product = ops.linear(values_TI.float(), weight.values.float())
    return (product * scales_T1 * weight.scales.t()).to(x_TI.dtype)


def add_linear(residual_TO: Tensor, x_TI: Tensor, weight: Tensor | ScaledWeight, ops: RowOps) -> Tensor:
    """The residual plus rows times a weight. May overwrite the residual: on a GPU the product adds to it."""
    if isinstance(weight, Tensor) and x_TI.is_cuda:
        return residual_TO.addmm_(x_TI, weight.t())
    return linear(x_TI, weight, ops).add_(residual_TO)


def _check(weight: Tensor) -> None:
    if weight.dtype != torch.bfloat16:
        problem = f"goes with dtype bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
        raise InvalidRequest("quantization", "fp8", f"{problem}; set dtype='bfloat16'")
    if any(size % _MULTIPLE for size in weight.shape):
        problem = f"takes sizes that are multiples of {_MULTIPLE}; the model has {list(weight.shape)}"
        raise InvalidRequest("quantization", "fp8", problem)
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
        problem = "needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
        raise InvalidRequest("quantization", "fp8", problem)
