"""The other baseline: a static batch, padded on the left, over the engine's own weights.

All sequences end in the same column; pads in front are masked out and positions count from the first real
token. Shadow rows stand behind the sequences, as many as the canvas needs that needs most.
Every step computes logits of every row, pads included, and a softmax in fp64 over the vocabulary; the batch
runs until its last member is finished. Decisions are taken for each sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from remask.benchmarks.plain_canvas import Decoded, PlainCanvas
from remask.benchmarks.plain_loop import dense_statistics
from remask.scheduler.params import SamplingParams
from remask.workers.attention.varlen import AttentionBackend, VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows

BATCH_SIZE = 16
PAD_ID = 0


class PaddedAttention(AttentionBackend):
    """SDPA over [batch, length] with one mask; it ignores the variable-length layout."""

    name = "padded"

    def __init__(self, visible_BTT: Tensor) -> None:
        self._visible = visible_BTT

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        shape = self._visible.shape[:2]
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_QHd, k_TKd, v_TKd))
        mask, grouped = self._visible.unsqueeze(1), q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)


def decode(model: TransformerDenoiser, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Decoded]:
    """Fills all canvases, in batches in the order given."""
    batches = [requests[i : i + BATCH_SIZE] for i in range(0, len(requests), BATCH_SIZE)]
    return [decoded for batch in batches for decoded in decode_batch(model, batch)]


@torch.inference_mode()
def decode_batch(
    model: TransformerDenoiser, requests: Sequence[tuple[list[int], SamplingParams]]
) -> list[Decoded]:
    """Fills the canvases of one batch."""
    canvases = [PlainCanvas(prompt, params, model.mask_id) for prompt, params in requests]
    shift = model.config.shift
    length = max(len(canvas.ids) for canvas in canvases)
    while not all(canvas.finished for canvas in canvases):
        padded = _padded(canvases, length, shift)
        ids_BT, positions_BT, given_BT, visible_BTT = (tensor.to(model.device) for tensor in padded)
        rows = torch.arange(ids_BT.numel(), device=model.device)
        layout = VarlenLayout((0, len(rows)), (0, len(rows)), ())
        packed = PackedRows(ids_BT.flatten(), positions_BT.flatten(), layout, rows, layout, rows, len(rows))
        logits = model.model.logits(model.model(packed, PaddedAttention(visible_BTT)))
        statistics = dense_statistics(logits, given_BT.flatten(), model.mask_id)
        proposal, confidence, verified = (part.view_as(ids_BT).cpu().numpy() for part in statistics)
        for i, canvas in enumerate(canvases):
            if canvas.finished:
                continue
            pads = length - len(canvas.ids)
            own = slice(pads + canvas.start - shift, pads + canvas.end - shift)
            shadow = slice(length, length + canvas.end - canvas.start)
            canvas.step(
                proposal[i, own], confidence[i, own], verified[i, shadow] if canvas.verifies else None
            )
    return [canvas.decoded() for canvas in canvases]


def _padded(
    canvases: Sequence[PlainCanvas], length: int, shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, positions and verified tokens [B, T], and which row sees which [B, T, T]."""
    shadows = [None if canvas.finished else canvas.shadows(shift) for canvas in canvases]
    size = length + max(0 if own is None else len(own.ids) for own in shadows)
    ids_BT = torch.full((len(canvases), size), PAD_ID)
    positions_BT, given_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    visible_BTT = torch.zeros(len(canvases), size, size, dtype=torch.bool)
    visible_BTT.diagonal(dim1=1, dim2=2).fill_(True)  # a pad sees itself, so that its softmax is defined
    for i, (canvas, own) in enumerate(zip(canvases, shadows, strict=True)):
        main = slice(length - len(canvas.ids), length)
        ids_BT[i, main] = torch.from_numpy(canvas.ids)
        positions_BT[i, main] = torch.arange(len(canvas.ids))
        visible_BTT[i, main, main] = True
        if own is not None and len(own.ids):
            shadow = slice(length, length + len(own.ids))
            ids_BT[i, shadow], positions_BT[i, shadow] = map(torch.from_numpy, (own.ids, own.positions))
            given_BT[i, length : length + len(own.slots)] = torch.from_numpy(canvas.ids[own.slots])
            visible_BTT[i, shadow, main.start : shadow.stop] = torch.from_numpy(own.sees)
    return ids_BT, positions_BT, given_BT, visible_BTT
