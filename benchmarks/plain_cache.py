"""The baseline with reused keys: a prefix or dual cache as the published code has it (Wu et al. 2025,
Fast-dLLM), one request at a time over the engine's own weights.

The first forward of a block computes the whole sequence and keeps its keys and values. The others compute the
block (`both`), or all from the block on (`prefix`), and see the kept keys of everything else. Every forward
makes logits of all its rows and a softmax in fp64 over the vocabulary, as `plain_loop` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remask.benchmarks.plain_canvas import Decoded, PlainCanvas
from remask.benchmarks.plain_loop import dense_statistics
from remask.scheduler.params import SamplingParams
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import KeptPlaces, PackedRows


@torch.inference_mode()
def decode(model: TransformerDenoiser, prompt: list[int], params: SamplingParams) -> Decoded:
    """Fills one canvas."""
    canvas, config = PlainCanvas(prompt, params, model.mask_id), model.config
    assert canvas.reuse is not None, "it reuses keys"
    assert not canvas.verifies, "the published loops do not verify"
    assert not config.shift, "they are for logits that are not shifted"
    shape = (config.num_layers, 2, len(canvas.ids), config.num_kv_heads, config.head_dim)
    kept = torch.empty(shape, dtype=model.model.embedding.dtype)
    while not canvas.finished:
        start, end = 0, len(canvas.ids)
        if not canvas.begins_block:
            start, end = canvas.start, canvas.end if canvas.reuse == "both" else end
        proposal, confidence = _forward(model, canvas, kept, start, end)
        own = slice(canvas.start - start, canvas.end - start)
        canvas.step(proposal[own].numpy(), confidence[own].numpy(), None)
    return canvas.decoded()


def _forward(
    model: TransformerDenoiser, canvas: PlainCanvas, kept: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Proposals of the rows of a range, and their probabilities; the others' keys are the kept ones."""
    ids, positions = torch.from_numpy(canvas.ids[start:end]), torch.arange(start, end)
    every = torch.arange(len(ids))
    layout = VarlenLayout((0, len(ids)), (0, len(ids)), (), kept=((0, len(canvas.ids)),))
    places = KeptPlaces(positions, gathered=None, num_fresh=len(ids), num_main=len(ids))
    rows = PackedRows(ids, positions, layout, every, layout, every, len(ids), places)
    logits = model.model.logits(model.model(rows, SdpaAttention(), kept_L2NKd=kept))
    proposal, confidence, _ = dense_statistics(logits, ids, model.mask_id)
    return proposal, confidence
