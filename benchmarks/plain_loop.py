"""The baseline: decoding as the published code does it, one request at a time over the engine's own weights.

A step is one forward of one sequence, logits of every row and a softmax in fp64 over the vocabulary; WINO
appends its shadow block to the sequence in every step. The transformer is the engine's, with its fused
projections and SDPA, so that only the way of decoding is compared.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from remask.benchmarks.plain_canvas import Decoded, PlainCanvas
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
    while not canvas.finished:
        rows = mapped(rows_of(canvas), lambda tensor: tensor.to(model.device))
        logits = model.model.logits(model.model(rows, SdpaAttention()))
        ids = torch.from_numpy(canvas.ids)
        given = ids.to(model.device)[rows.positions_T]  # of a shadow row, the token at its position
        proposal, confidence, verified = (
            part.cpu().numpy() for part in dense_statistics(logits, given, model.mask_id)
        )
        own, shadow = slice(canvas.start, canvas.end), slice(len(ids), None)
        canvas.step(proposal[own], confidence[own], verified[shadow] if canvas.verifies else None)
    return canvas.decoded()


def dense_statistics(logits_TV: Tensor, given_T: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, its probability, and the probability of a given token, for every row; overwrites logits."""
    probabilities_TV = logits_TV.double().softmax(-1)
    logits_TV[:, mask_id] = -torch.inf
    proposal_T = logits_TV.argmax(-1)
    confidence_T, given_prob_T = (
        probabilities_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1) for ids_T in (proposal_T, given_T)
    )
    return proposal_T, confidence_T, given_prob_T


def rows_of(canvas: PlainCanvas) -> PackedRows:
    """The whole sequence, then the shadow block; every row is a candidate."""
    length, width = len(canvas.ids), canvas.end - canvas.start if canvas.verifies else 0
    block = np.arange(canvas.start, canvas.start + width)
    ids = torch.from_numpy(np.concatenate([canvas.ids, np.full(width, canvas.mask_id)]))
    positions = torch.from_numpy(np.concatenate([np.arange(length), block]))
    shadows = ()
    if width:
        mask = torch.ones(width, length + width, dtype=torch.bool)
        mask[range(width), block] = False
        shadows = (ShadowSegment(0, (0, width), (0, width), mask),)
    layout = VarlenLayout((0, length), (0, length), shadows)
    rows = torch.arange(length + width)
    return PackedRows(ids, positions, layout, rows, layout, rows, len(rows))
