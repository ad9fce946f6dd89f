"""The interface of models: packed rows in, statistics of slots out."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from remask.scheduler.errors import InvalidRequest
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.select import pick_attention
from remask.workers.attention.varlen import AttentionBackend
from remask.workers.head import Statistics, head_statistics
from remask.workers.models.config import ModelConfig, TransformerConfig
from remask.workers.models.cpu import keep_freed_memory, multiplies, padded_len
from remask.workers.models.dummy import dummy_model
from remask.workers.models.fp8 import quantize_layers
from remask.workers.models.loading import load_checkpoint
from remask.workers.models.row_ops import EAGER, TILED, triton_ops
from remask.workers.models.tiles import ignores_places, tile_len
from remask.workers.models.transformer import Transformer
from remask.workers.rows.kept import DISCARDED
from remask.workers.rows.pack import HeadQuery, PackedRows

logger = logging.getLogger(__name__)

CPU_PACK_ROWS = 1024  # larger packs are no faster
GPU_PACK_ROWS = 1 << 30  # only the row budget limits a forward


class Denoiser(ABC):
    """A model of masked sequences.

    Attributes:
        config: ids and lengths of the model.
        mask_id: id of the mask token, M.
        device: device of its tensors.
        pack_rows: rows above which a larger pack is no faster. On a CPU a pack that exceeds the cache is
            slower.
        static_shapes: whether packs have the same shapes in every step, so that the host does not wait for
            the device. If not, packs hold only the rows that a step needs.
        key_row_bytes: bytes of the keys and values of a row, in all layers; 0: it has none, or cannot keep
            them.
    """

    config: ModelConfig
    mask_id: int
    device: torch.device
    pack_rows: int
    static_shapes: bool = False
    key_row_bytes: int = 0

    def use_tiles(self) -> bool:
        """Computes from now on so that no number of a slot depends on the other slots of its pack, to the
        bit; returns whether that is possible here."""
        return False

    def keep_rows(self, num_rows: int) -> None:
        """Allocates the keys and values of kept rows, or frees them (0 rows)."""
        raise NotImplementedError

    def make_keys(self, rows: PackedRows) -> None:
        """Computes the keys and values of a pack and writes them to kept rows."""
        raise NotImplementedError

    @abstractmethod
    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        """Statistics of the N slots of a pack."""


class TransformerDenoiser(Denoiser):
    """A transformer and its head.

    Args:
        model: the transformer.
        attention: backend that applies the pack's visibility.
        pack_rows, static_shapes: see `Denoiser`.
        kernels: whether Triton kernels compute the head and the row operations; needs static shapes.
    """

    config: TransformerConfig

    def __init__(
        self,
        model: Transformer,
        attention: AttentionBackend,
        *,
        pack_rows: int,
        static_shapes: bool = False,
        kernels: bool = False,
    ) -> None:
        self.model, self.attention, self.pack_rows = model, attention, pack_rows
        self.config, self.static_shapes, self.kernels = model.config, static_shapes, kernels
        self.ops = triton_ops() if kernels else EAGER
        self.mask_id, self.device = model.config.mask_id, model.embedding.device
        self._key_shape = (model.config.num_layers, 2, model.config.num_kv_heads, model.config.head_dim)
        self._kept_keys: Tensor | None = None
        self.key_row_bytes = math.prod(self._key_shape) * model.embedding.dtype.itemsize
        pads = self.device.type == "cpu" and model.embedding.dtype != torch.float32
        self._padded_len: Callable[[int], int] | None = padded_len if pads else None

    def use_tiles(self) -> bool:
        # The rows of an expert's product depend on the other canvases of a pack.
        is_dense = self.device.type == "cpu" and self.config.experts is None
        usable = is_dense and all(map(ignores_places, self.model.products()))
        logger.info("batch invariance by %s", "tiles" if usable else "a forward for each canvas")
        if usable:
            self.ops, self._padded_len = TILED, tile_len
            if isinstance(self.attention, SdpaAttention) and self.model.embedding.dtype != torch.float32:
                self.attention = SdpaAttention(batches=False)
        return usable

    def keep_rows(self, num_rows: int) -> None:
        if self._kept_keys is not None and self._kept_keys.shape[2] == num_rows:
            return
        layers, two, heads, head_dim = self._key_shape
        shape, like = (layers, two, num_rows, heads, head_dim), self.model.embedding
        self._kept_keys = torch.empty(shape, dtype=like.dtype, device=like.device) if num_rows else None
        if self._kept_keys is not None:
            self._kept_keys[:, :, DISCARDED].zero_()  # kernels may read it behind other rows

    def make_keys(self, rows: PackedRows) -> None:
        self._hidden(replace(rows, candidates_H=rows.candidates_H[:0]))

    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        hidden_HD = self._hidden(rows)[: len(rows.candidates_H)]
        return self._fused(hidden_HD, query) if self.kernels else self._whole_logits(hidden_HD, query)

    def _hidden(self, rows: PackedRows) -> Tensor:
        """Hidden states of the candidates, and of padding."""
        packed = rows if self._padded_len is None else rows.padded(self._padded_len)
        return self.model(packed, self.attention, self.ops, self._kept_keys)

    def _whole_logits(self, hidden_HD: Tensor, query: HeadQuery) -> Statistics:
        return head_statistics(hidden_HD, self._logits, self.config.vocab_size, query, self.mask_id)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D]."""
        if self._padded_len is None:
            return self.model.logits(hidden_ND)
        count = len(hidden_ND)
        padded = torch.nn.functional.pad(hidden_ND, (0, 0, 0, self._padded_len(count) - count))
        return self.model.logits(padded, self.ops)[:count]

    def _fused(self, hidden_HD: Tensor, query: HeadQuery) -> Statistics:
        """Statistics by one pass over the vocabulary; special slots are computed from whole logits."""
        from remask.workers.kernels.head import fused_statistics

        assert query.live is not None, "shapes are static"
        hidden_ND = hidden_HD if query.hidden is None else hidden_HD[query.hidden.first]
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
            keys_N=query.keys if query.keys is not None else query.given,
            mask_id=self.mask_id,
            needs=query.needs,
            out=out,
        )
        if query.special is not None:
            asked = query.select(query.special)
            hidden = hidden_HD if asked.hidden is not None else hidden_HD[query.special]
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
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        load_format: "auto" reads the checkpoint's weights, "dummy" makes random ones.
        attention_backend, quantization: see `denoiser_of`.

    Raises:
        InvalidRequest: the device does not exist, or the checkpoint is invalid.
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
        dtype: the option. With "auto" a CPU may compute in another dtype than that of the weights.
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
    if model.config.experts is not None and quantization is not None:
        raise InvalidRequest("quantization", quantization, "is not supported for experts; leave it out")
    if quantization == "fp8":
        quantize_layers(model.blocks)
    on_cpu = weight.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    kernels = not on_cpu and find_spec("triton") is not None
    if model.config.experts is not None and not (on_cpu or kernels):
        raise InvalidRequest("device", str(weight.device), "needs Triton for experts; install it, or use cpu")
    logger.info(
        "attention by %s, %s", attention.name, "Triton kernels" if kernels else "no kernels of our own"
    )
    return TransformerDenoiser(
        model,
        attention,
        pack_rows=CPU_PACK_ROWS if on_cpu else GPU_PACK_ROWS,
        static_shapes=not on_cpu,
        kernels=kernels,
    )


def pick_device(device: str) -> str:
    """Resolves "auto" and checks that torch has the device.

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
