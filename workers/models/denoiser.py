"""The seam to models: segments in, statistics out. Whatever answers for packed rows can be denoised with."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from remask.scheduler.errors import InvalidRequest
from remask.workers.attention.select import pick_attention
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.head import Statistics, head_statistics
from remask.workers.models.config import ModelConfig, TransformerConfig
from remask.workers.models.dummy import dummy_model
from remask.workers.models.fp8 import quantize_layers
from remask.workers.models.loading import load_checkpoint
from remask.workers.models.row_ops import EAGER, triton_ops
from remask.workers.models.transformer import Transformer
from remask.workers.rows import HeadQuery, PackedRows

logger = logging.getLogger(__name__)

CPU_PACK_ROWS = 1024  # a larger pack gains nothing
GPU_PACK_ROWS = 1 << 30  # the row budget alone bounds a forward


class Denoiser(ABC):
    """A model of masked sequences.

    Attributes:
        config: its ids and lengths.
        mask_id: M.
        device: where its tensors live.
        pack_rows: rows of a forward beyond which a larger pack is no faster (on a CPU, one that leaves the
            cache is slower).
        fixed_shapes: whether packs have the same shapes in every step, so that the host need not wait for
            the device; else they hold no row too many.
    """

    config: ModelConfig
    mask_id: int
    device: torch.device
    pack_rows: int
    fixed_shapes: bool = False

    @abstractmethod
    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        """Statistics of the N slots that a pack answers for."""


class TransformerDenoiser(Denoiser):
    """A transformer and its head.

    Args:
        model: the weights.
        attention: which rows see which is its matter.
        pack_rows, fixed_shapes: see `Denoiser`.
        kernels: whether Triton does the head, and what layers do between products; needs fixed shapes.
    """

    config: TransformerConfig

    def __init__(
        self,
        model: Transformer,
        attention: AttentionBackend,
        *,
        pack_rows: int,
        fixed_shapes: bool = False,
        kernels: bool = False,
    ) -> None:
        self.model, self.attention, self.pack_rows = model, attention, pack_rows
        self.config, self.fixed_shapes, self.kernels = model.config, fixed_shapes, kernels
        self.ops = triton_ops() if kernels else EAGER
        self.mask_id, self.device = model.config.mask_id, model.embedding.device

    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        hidden_HD = self.model(rows, self.attention, self.ops)
        return self._fused(hidden_HD, query) if self.kernels else self._whole_logits(hidden_HD, query)

    def _whole_logits(self, hidden_HD: Tensor, query: HeadQuery) -> Statistics:
        return head_statistics(hidden_HD, self.model.logits, self.config.vocab_size, query, self.mask_id)

    def _fused(self, hidden_HD: Tensor, query: HeadQuery) -> Statistics:
        """What one pass over the vocabulary can answer; the special slots' logits are looked at again."""
        from remask.workers.kernels.head import fused_statistics

        assert query.live is not None, "shapes are fixed"
        hidden_ND = hidden_HD if query.guidance is None else hidden_HD[query.guidance.first]
        live = query.live
        if query.special is not None:
            live = live.index_fill(0, query.special, False)
        out = Statistics.blank(len(live), self.device)
        fused_statistics(
            self.model.normed(hidden_ND, self.ops),
            self.model.head_weight,
            live_N=(~live).to(torch.int8).argsort(stable=True).int(),
            count=live.sum(dtype=torch.int32).view(1),
            given_N=query.given,
            temperature_N=query.temperature,
            keys_N=query.keys,
            mask_id=self.mask_id,
            needs=query.needs,
            out=out,
        )
        if query.special is not None:
            asked = query.select(query.special)
            hidden = hidden_HD if asked.guidance is not None else hidden_HD[query.special]
            out.put(query.special, self._whole_logits(hidden, asked))
        return out


def load_denoiser(
    directory: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: str = "auto",
    attention_backend: str = "auto",
    quantization: str | None = None,
) -> TransformerDenoiser:
    """The model in a local checkpoint directory, ready to denoise.

    Args:
        directory: see `load_checkpoint` and `dummy_model`.
        dtype: "auto" (the checkpoint's; float32 on a CPU that cannot multiply it), "float32", "bfloat16" or
            "float16".
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1".
        load_format: "auto" reads the checkpoint's weights, "dummy" makes random ones.
        attention_backend, quantization: see `denoiser_of`.

    Raises:
        InvalidRequest: the device is not here, or the checkpoint is at fault.
    """
    load = dummy_model if load_format == "dummy" else load_checkpoint
    model = load(directory, dtype=dtype, device=pick_device(device))
    return denoiser_of(model, dtype=dtype, attention_backend=attention_backend, quantization=quantization)


def denoiser_of(
    model: Transformer, *, dtype: str, attention_backend: str = "auto", quantization: str | None = None
) -> TransformerDenoiser:
    """A loaded model, ready to denoise.

    Args:
        model: its weights are replaced where they are quantized.
        dtype: that was asked for; where it is "auto" a CPU may compute in another one than the weights'.
        attention_backend: see `pick_attention`.
        quantization: None, or "fp8" (`remask.workers.models.fp8`).

    Raises:
        InvalidRequest: backend or quantization do not serve the model where it is.
    """
    if (
        dtype == "auto"
        and quantization is None
        and not multiplies(model.embedding.dtype, model.embedding.device)
    ):
        logger.info("this CPU cannot multiply %s: computing in float32", model.embedding.dtype)
        model = model.float()
    weight, head_dim = model.embedding, model.config.head_dim
    attention = pick_attention(attention_backend, device=weight.device, dtype=weight.dtype, head_dim=head_dim)
    if quantization == "fp8":
        quantize_layers(model.blocks)
    on_cpu = weight.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
        bound_kernel_caches()
    kernels = not on_cpu and find_spec("triton") is not None
    logger.info(
        "attention by %s, %s", attention.name, "Triton kernels" if kernels else "no kernels of our own"
    )
    return TransformerDenoiser(
        model,
        attention,
        pack_rows=CPU_PACK_ROWS if on_cpu else GPU_PACK_ROWS,
        fixed_shapes=not on_cpu,
        kernels=kernels,
    )


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has kernels for a dtype; without them a CPU takes some hundred times as long."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(dtype, lambda: True)()


def keep_freed_memory() -> None:
    """Lets the C library keep up to 64 MB of freed memory instead of returning it layer by layer.

    glibc raises its thresholds to the largest block (of at most 32 MB) that was ever freed; until then every
    forward faults all its activations in again.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def bound_kernel_caches() -> None:
    """Lets oneDNN and torch's bindings to it keep 16 prepared kernels instead of 1,024.

    They keep one for every shape of a bf16 product. Packs and candidates rarely have the same number of rows
    twice, so the caches fill with kernels that are not met again: 300 MB beside the embedded model. The
    capacities are environment variables that are read when the first product runs; they are set for as long
    as that takes, unless the user has set them. Where a product has run before, nothing changes.
    """
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    ours = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "16"))
    try:
        matrix = torch.ones(64, 64, dtype=torch.bfloat16)
        torch.nn.functional.linear(matrix, matrix)
    finally:
        for name in ours:
            del os.environ[name]


def pick_device(device: str) -> str:
    """A device that torch has here.

    Raises:
        InvalidRequest: it is unknown or torch does not see it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise InvalidRequest("device", device, "use auto, cpu, cuda or cuda:N")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            "device", device, f"torch sees {torch.cuda.device_count()} GPUs here; use cpu, or one of them"
        )
    return device
