"""How a proposal is made from a row's logits: what a canvas keeps of its request's sampling parameters."""

from __future__ import annotations

from typing import Literal

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Edits of the logits, then filters and the draw, then what ranking may see.

    Attributes:
        cfg_scale: guidance w: logits u + (w + 1)(l - u), u of a second row that sees fixed tokens as masks.
        logit_bias: added to the logits of ids.
        banned_ids: their logits are -inf.
        allowed_ids: the logits of all others are -inf; empty: all are allowed.
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: which tokens may be drawn at a temperature, of the tempered softmax: the k most
            probable (0: all), those of at least `min_p` of the largest probability, and of these the fewest
            whose share is at least `top_p`.
        rank: what confidence means: the probability of the token drawn, or the row's largest.
        ranks_as_drawn: what is ranked are probabilities after temperature and filters.
        unranked_ids: their logits are -inf for ranking only: such a proposal ranks with confidence 0.
    """

    cfg_scale: float = 0.0
    logit_bias: dict[int, float] = {}
    banned_ids: list[int] = []
    allowed_ids: list[int] = []
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    rank: Literal["proposal", "top"] = "proposal"
    ranks_as_drawn: bool = False
    unranked_ids: list[int] = []

    @property
    def filters(self) -> bool:
        """Whether a part of the vocabulary counts for what is drawn or ranked."""
        uses_heat = self.temperature > 0 or self.ranks_as_drawn
        return uses_heat and (self.top_p < 1 or self.min_p > 0 or self.top_k > 0)

    @property
    def reranks(self) -> bool:
        """Whether another softmax than the untempered one is ranked by."""
        return self.ranks_as_drawn or bool(self.unranked_ids)

    @property
    def edits(self) -> bool:
        """Whether logits are changed before everything else."""
        return bool(self.cfg_scale > 0 or self.logit_bias or self.banned_ids or self.allowed_ids)
