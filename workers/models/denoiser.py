"""The seam to models: segments in, statistics out. Whatever answers a `RowPack` can be denoised with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from remask.workers.attention.varlen import AttentionBackend
from remask.workers.head import Statistics, head_statistics
from remask.workers.models.transformer import Transformer
from remask.workers.rows import RowPack


class Denoiser(ABC):
    """A model of masked sequences.

    Attributes:
        mask_id: M.
        device: where its tensors live.
        pack_rows: rows of a forward beyond which a larger pack is no faster (on a CPU, one that leaves the
            cache is slower).
    """

    mask_id: int
    device: torch.device
    pack_rows: int

    @abstractmethod
    def statistics(self, pack: RowPack) -> Statistics:
        """Statistics [N] for the N rows of `pack.query`."""


class TransformerDenoiser(Denoiser):
    """A transformer and its head."""

    def __init__(self, model: Transformer, attention: AttentionBackend, *, pack_rows: int) -> None:
        self.model, self.attention, self.pack_rows = model, attention, pack_rows
        self.mask_id, self.device = model.config.mask_id, model.embedding.device

    def statistics(self, pack: RowPack) -> Statistics:
        hidden_TD = self.model(pack.ids_T, pack.positions_T, pack.layout, self.attention)
        hidden_ND = self.model.final_hidden(hidden_TD[pack.query.rows])
        weight_VD = self.model.head[: self.model.config.vocab_size]
        return head_statistics(hidden_ND, weight_VD, pack.query, self.mask_id)
