"""The varlen description of a pack, and what an attention backend is.

Main rows of all sequences come first, then the shadow rows of those that verify: main rows never see shadow
rows, so a backend serves them with one ordinary variable-length call, whatever the policies are. Keys are
always all rows of a pack; queries are all of them, or in a model's last layer only those that somebody reads.

Two descriptions say the same. The one on the host is made for loops over sequences. Where shapes are fixed
there is also one whose numbers are on the device (`DeviceLayout`): kernels read it, and it may change without
the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
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
        spans: on the host, for each sequence with shadow rows its place in the pack, its first main row and
            their end, its first shadow row and their end.
    """

    tiles: Tensor
    holes: Tensor
    is_key: Tensor
    sees_block: Tensor
    spans: tuple[tuple[int, int, int, int, int], ...]

    @cached_property
    def segments(self) -> tuple[ShadowSegment, ...]:
        """The same in masks, which are made when they are first asked for."""
        segments = []
        for sequence, main_first, main_end, first, end in self.spans:
            own, length = slice(first, end), main_end - main_first
            mask = shadow_mask(self.holes[own].long() - main_first, length, self.sees_block[own])
            itself = torch.eye(end - first, dtype=torch.bool, device=mask.device)
            mask[:, length:] &= self.is_key[own] | itself
            segments.append(ShadowSegment(sequence, (first, end), (first, end), mask))
        return tuple(segments)


@dataclass(frozen=True)
class DeviceLayout:
    """A layout for kernels.

    Attributes:
        cu_queries, cu_keys: int32 [sequences + 1]: boundaries of the sequences among the main rows.
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

    @property
    def segments(self) -> tuple[ShadowSegment, ...]:
        """All shadow rows, with masks."""
        if self.device is None or self.device.shadows is None:
            return self.shadows
        return self.device.shadows.segments


def shadow_mask(holes_K: Tensor, length: int, sees_block: Tensor) -> Tensor:
    """Which main rows, then shadow rows of its sequence each shadow row sees, bool [K, length + K].

    It sees all main rows but the one at its own position (`holes_K`, int64), and where it sees its block
    (bool [K], or [1] for all) every shadow row, else of these only itself.
    """
    count = len(holes_K)
    main = torch.ones(count, length, dtype=torch.bool, device=holes_K.device)
    main.scatter_(1, holes_K.unsqueeze(1), False)
    itself = torch.eye(count, dtype=torch.bool, device=holes_K.device)
    return torch.cat([main, sees_block.unsqueeze(1) | itself], dim=1)


class AttentionBackend(ABC):
    """Bidirectional attention over packed rows.

    Attributes:
        name: as in `attention_backend=`.
        reads_device: whether it looks at nothing but a layout's `device`: it can then be captured in a graph
            that serves other canvases.
    """

    name: str
    reads_device: bool = False

    @abstractmethod
    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        """Attention output [Q, H, d] for queries [Q, H, d], keys and values [T, K, d] (H a multiple of K)."""
