"""The varlen description of a pack, and what an attention backend is.

Main rows of all sequences come first, then the shadow rows of those that verify: main rows never see shadow
rows, so a backend serves them with one ordinary variable-length call, whatever the policies are. Keys are
always all rows of a pack; queries are all of them, or in a model's last layer only those that somebody reads.

There are two descriptions. Where the host knows how many rows there are in every step (on a CPU), it lists
them. Where it must not ask the device, shapes are fixed for a whole burst and the device holds the rest
(`DeviceLayout`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

SHADOW_TILE = 32  # rows of a tile of shadow rows


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
class DeviceShadows:
    """The S shadow rows of a pack of fixed shape, all of them queries as well as keys. Those of a sequence
    stand together.

    A shadow row sees the main rows of its sequence but one, itself, and where it sees its block all shadow
    rows of the sequence that are keys.

    Attributes:
        tiles: int32 [tiles, 6], all counted from the first shadow or main row: first shadow row of up to
            SHADOW_TILE of one sequence, and their end (excluded); first main row of the sequence, and its
            end; first shadow row of the sequence, and its end. A tile may be empty.
        holes: int32 [S]: the main row that each does not see.
        is_key: bool [S]: whether others may see it.
        sees_block: bool [S].
    """

    tiles: Tensor
    holes: Tensor
    is_key: Tensor
    sees_block: Tensor


@dataclass(frozen=True)
class DeviceLayout:
    """A layout for kernels: the numbers are on the device, and only they change from burst to burst.

    Attributes:
        cu_queries, cu_keys: int32 [sequences + 1]: boundaries among the main rows. Sequences may be empty,
            and rows may stand behind the last one, which no sequence owns: their output means nothing.
        max_queries, max_keys: no sequence has more.
        shadows: None where nobody verifies.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    shadows: DeviceShadows | None


@dataclass(frozen=True)
class VarlenLayout:
    """Which rows attend to which.

    Attributes:
        cu_queries: boundaries of the sequences in the main queries, one more than there are sequences.
        cu_keys: boundaries of the sequences in the main keys.
        shadows: the shadow rows behind the main rows, in queries and keys; empty where nobody verifies, and
            where `device` describes them.
        device: the same for kernels; None where shapes differ from step to step.
    """

    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    shadows: tuple[ShadowSegment, ...]
    device: DeviceLayout | None = None


class AttentionBackend(ABC):
    """Bidirectional attention over packed rows."""

    name: str

    @abstractmethod
    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        """Attention output [Q, H, d] for queries [Q, H, d], keys and values [T, K, d] (H a multiple of K)."""
