"""The varlen description of a pack, and what an attention backend is.

Main rows of all sequences come first, then the shadow rows of those that verify: main rows never see shadow
rows, so a backend serves them with one ordinary variable-length call, whatever the policies are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ShadowSegment:
    """The shadow rows of one sequence.

    Attributes:
        main_start, main_end: its main rows in the pack.
        start, end: its shadow rows in the pack.
        mask: bool [B, L + B]: whether a shadow row (query) sees the sequence's main rows, then its shadow
            rows.
    """

    main_start: int
    main_end: int
    start: int
    end: int
    mask: Tensor


@dataclass(frozen=True)
class VarlenLayout:
    """Which rows attend to which.

    Attributes:
        cu_seqlens: boundaries of the sequences in the main rows, one more than there are sequences.
        shadows: the shadow rows behind the main rows; empty where nobody verifies.
    """

    cu_seqlens: tuple[int, ...]
    shadows: tuple[ShadowSegment, ...]


class AttentionBackend(ABC):
    """Bidirectional attention over packed rows."""

    name: str

    @abstractmethod
    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        """Attention output [T, H, d] for queries [T, H, d], keys and values [T, K, d] (H a multiple of K)."""
