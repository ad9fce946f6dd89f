"""The sampling parameters of a canvas: how a proposal is made from a row's logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

TOKEN = np.dtype("<i4")
Reuse: TypeAlias = Literal["prefix", "both"]
BIAS = np.dtype([("id", "<i4"), ("bias", "<f4")])


def id_bytes(ids: Iterable[int]) -> bytes:
    """Token ids on the wire: int32, unique, in ascending order."""
    return np.unique(np.fromiter(ids, TOKEN)).tobytes()


def id_array(ids: bytes) -> NDArray[np.int32]:
    """The ids in the bytes that `id_bytes` returns."""
    return np.frombuffer(ids, TOKEN)


def bias_bytes(biases: Mapping[int, float]) -> bytes:
    """Biases of logits on the wire: `BIAS` [ids], in ascending order of the ids."""
    return np.array(sorted(biases.items()), BIAS).tobytes()


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Edits of the logits, filters and temperature of the draw, and the softmax that ranks.

    Lists of ids are bytes, because they may hold a whole vocabulary and are sent with every burst.

    Attributes:
        cfg_scale: guidance w: logits u + (w + 1)(l - u), u of a second row that sees fixed tokens as masks.
        logit_bias: added to the logits of ids; see `bias_bytes`.
        banned_ids: their logits are -inf; see `id_bytes`.
        allowed_ids: the logits of all other ids are -inf; empty: all ids are allowed; see `id_bytes`.
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: which tokens may be drawn at a temperature, of the tempered softmax: the k most
            probable (0: all), those of at least `min_p` of the largest probability, and of these the fewest
            whose share is at least `top_p`.
        rank: meaning of confidence: the probability of the drawn token, or the row's largest.
        ranks_as_drawn: rank by the probabilities after temperature and filters.
        unranked_ids: their logits are -inf for ranking only; a proposal of such an id has confidence 0.
    """

    cfg_scale: float = 0.0
    logit_bias: bytes = b""
    banned_ids: bytes = b""
    allowed_ids: bytes = b""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    rank: Literal["proposal", "top"] = "proposal"
    ranks_as_drawn: bool = False
    unranked_ids: list[int] = []

    @cached_property
    def filters(self) -> bool:
        """Whether filters leave out a part of the vocabulary when tokens are drawn or ranked."""
        uses_heat = self.temperature > 0 or self.ranks_as_drawn
        return uses_heat and (self.top_p < 1 or self.min_p > 0 or self.top_k > 0)

    @cached_property
    def reranks(self) -> bool:
        """Whether positions are ranked by a softmax other than the untempered one."""
        return self.ranks_as_drawn or bool(self.unranked_ids)

    @cached_property
    def edits(self) -> bool:
        """Whether logits are changed before everything else."""
        return bool(self.cfg_scale > 0 or self.logit_bias or self.banned_ids or self.allowed_ids)
