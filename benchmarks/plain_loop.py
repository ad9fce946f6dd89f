"""The baseline: decoding as the published code does it, one request at a time over the engine's own weights.

A step is one forward of one sequence, logits of every row and a softmax in fp64 over the vocabulary; WINO
appends its shadow block to the sequence in every step. The transformer is the engine's, with its fused
projections and SDPA, so that only the way of decoding is compared.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remask.benchmarks.plain_canvas import Decoded, PlainCanvas, Reals, Shadows
from remask.scheduler.params import SamplingParams
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import ShadowSegment, VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows
from remask.workers.tensors import mapped


@torch.inference_mode()
def decode(model: TransformerDenoiser, prompt: list[int], params: SamplingParams) -> Decoded:
    """Fills one canvas."""
    canvas = PlainCanvas(prompt, params, model.mask_id)
    assert canvas.reuse is None, "it computes all rows; `plain_cache` does not"
    while not canvas.finished:
        proposal, confidence, given = forward(model, canvas)
        own, shadow = slice(canvas.start, canvas.end), slice(len(canvas.ids), None)
        canvas.step(proposal[own], confidence[own], given[shadow] if canvas.verifies else None)
    return canvas.decoded()


def forward(model: TransformerDenoiser, canvas: PlainCanvas) -> tuple[NDArray[np.int64], Reals, Reals]:
    """One forward of a canvas.

    Returns:
        Proposal, its probability, and the probability of the token that stands there: for every position of
        the sequence, then, off the shadow rows, for every slot of the block. If logits are shifted, position
        0 has those of its own row, which nothing reads.
    """
    length, shadows, shift = len(canvas.ids), canvas.shadows(model.config.shift), model.config.shift
    rows = mapped(_rows(canvas, shadows), lambda tensor: tensor.to(model.device))
    logits = model.model.logits(model.model(rows, SdpaAttention()))
    if shift:
        order = torch.arange(length + len(shadows.slots))
        order[:length] = (order[:length] - shift).clamp(min=0)
        logits = logits[order]
    given = torch.from_numpy(np.append(canvas.ids, canvas.ids[shadows.slots])).to(model.device)
    proposal, confidence, given_prob = (
        part.cpu().numpy() for part in dense_statistics(logits, given, model.mask_id)
    )
    return proposal, confidence, given_prob


def dense_statistics(logits_TV: Tensor, given_T: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, its probability, and the probability of a given token, for every row; overwrites logits."""
    probabilities_TV = logits_TV.double().softmax(-1)
    logits_TV[:, mask_id] = -torch.inf
    proposal_T = logits_TV.argmax(-1)
    confidence_T, given_prob_T = (
        probabilities_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1) for ids_T in (proposal_T, given_T)
    )
    return proposal_T, confidence_T, given_prob_T


def _rows(canvas: PlainCanvas, shadows: Shadows) -> PackedRows:
    """The whole sequence, then the shadow rows; every row is a candidate."""
    length, count = len(canvas.ids), len(shadows.ids)
    ids = torch.from_numpy(np.append(canvas.ids, shadows.ids))
    positions = torch.from_numpy(np.append(np.arange(length), shadows.positions))
    segments = (ShadowSegment(0, (0, count), (0, count), torch.from_numpy(shadows.sees)),) if count else ()
    layout, rows = VarlenLayout((0, length), (0, length), segments), torch.arange(length + count)
    return PackedRows(ids, positions, layout, rows, layout, rows, len(rows))
