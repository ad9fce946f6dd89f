"""The baseline: decoding as the published code does it, one request at a time over the engine's own weights.

A step is one forward of one sequence, logits of every row, a softmax in fp64 over the vocabulary, then
Fast-dLLM's threshold rule without a cache (arXiv 2505.22618). The transformer is the engine's, with its fused
projections and SDPA, so that only the way of decoding is compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows import PackedRows


class Decoded(NamedTuple):
    """A filled canvas and the forwards that it took."""

    token_ids: list[int]
    nfe: int


@torch.inference_mode()
def decode_by_threshold(
    model: TransformerDenoiser, prompt: list[int], canvas_len: int, block_len: int, threshold: float
) -> Decoded:
    """Fills a canvas: per step the best masked position of the block and all at or above `threshold`."""
    ids = torch.tensor(prompt + [model.mask_id] * canvas_len, device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    layout = VarlenLayout((0, len(ids)), (0, len(ids)), ())
    nfe = 0
    for start in range(len(prompt), len(ids), block_len):
        end = min(start + block_len, len(ids))
        while bool((ids[start:end] == model.mask_id).any()):
            rows = PackedRows(ids, positions, layout, positions, layout)  # every row is a candidate
            logits = model.model.logits(model.model(rows, model.attention))
            probabilities = logits.double().softmax(-1)
            logits[:, model.mask_id] = -torch.inf
            proposal = logits.argmax(-1)
            confidence = probabilities.gather(1, proposal.unsqueeze(1)).squeeze(1)
            open_slots = torch.zeros_like(ids, dtype=torch.bool)
            open_slots[start:end] = ids[start:end] == model.mask_id
            confidence = torch.where(open_slots, confidence, -torch.inf)
            commit = confidence >= threshold
            commit[confidence.argmax()] = True
            ids = torch.where(commit, proposal, ids)
            nfe += 1
    return Decoded(ids[len(prompt) :].tolist(), nfe)
