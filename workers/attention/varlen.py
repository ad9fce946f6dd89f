"""The varlen description of a pack, and what an attention backend is.

Main rows of all sequences come first, then the shadow rows of those that verify: main rows never see shadow
rows, so a backend serves them with one ordinary variable-length call, whatever the policies are. Keys are
always all rows of a pack; queries are all of them, or in a model's last layer only those that somebody reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ShadowSegment:
    """The shadow rows of one sequence.

    Attributes:
        sequence: its place in the pack.
        queries, keys: which of all shadow queries and shadow keys are its own (start, and end excluded).
        mask: bool [Q, L + K]: whether a shadow query sees the sequence's main rows, then its shadow rows.
    """

    sequence: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    mask: Tensor


@dataclass(frozen=True)
class VarlenLayout:
    """Which rows attend to which.

    Attributes:
        cu_queries: boundaries of the sequences in the main queries, one more than there are sequences.
        cu_keys: boundaries of the sequences in the main keys.
        shadows: the shadow rows behind the main rows, in queries and keys; empty where nobody verifies.
    """

    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    shadows: tuple[ShadowSegment, ...]


class AttentionBackend(ABC):
    """Bidirectional attention over packed rows."""

    name: str

    @abstractmethod
    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        """Attention output [Q, H, d] for queries [Q, H, d], keys and values [T, K, d] (H a multiple of K)."""
