"""The variable-length layout of a pack, and the interface of attention backends.

The main rows of all sequences come first, then the shadow rows. Main rows never see shadow rows, so one
ordinary variable-length call computes them under every policy. Keys are always all rows of a pack. Queries
are all rows, or only the candidates in the model's last layer.

Sequences of a forward that reuses keys see kept rows: keys and values of one layer in memory that outlives
the forward, with those of the forward written over them. All other sequences see rows of the pack.

A layout exists in two forms. `VarlenLayout` is on the host, for loops over sequences. With static shapes
`DeviceLayout` holds the same numbers in tensors on the device: kernels read them, and they can change without
the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SHADOW_TILE = 32  # rows of a tile of shadow rows
# The shadow rows of its sequence that a shadow row sees: itself; all that are keys; itself and the next one.
ITSELF, ITS_BLOCK, ITS_PAIR = 0, 1, 2


class ShadowSpan(NamedTuple):
    """Where the shadow rows of a sequence are.

    Attributes:
        sequence: index of the sequence in the pack.
        first_main, end_main: its main rows.
        first, end: its shadow rows, counted from the first shadow row of the pack.
        sees: `ITSELF`, `ITS_BLOCK`, or `ITS_PAIR`: then every second row sees itself.
    """

    sequence: int
    first_main: int
    end_main: int
    first: int
    end: int
    sees: int


@dataclass(frozen=True)
class ShadowSegment:
    """The shadow rows of one sequence.

    Attributes:
        sequence: index of the sequence of main keys.
        queries, keys: range of its rows among all shadow queries and shadow keys (start, exclusive end).
        mask: bool [Q, L + K]: whether a shadow query sees the sequence's main rows, then its shadow rows.
    """

    sequence: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    mask: Tensor


@dataclass(frozen=True)
class DeviceShadows:
    """The S shadow rows of a pack with static shapes. Each is a query and a key; those of a sequence are
    contiguous.

    A shadow row sees the main rows of its sequence except one, and of the shadow rows what `sees` says. With
    `ITS_PAIR` it does not see the main row before that one either.

    Attributes:
        tiles: int32 [tiles, 6]: three ranges for each tile (start, exclusive end): its shadow rows, at most
            SHADOW_TILE of one sequence; the main rows of the sequence; the shadow rows of the sequence. Each
            counts from the first row of its kind. A tile may be empty.
        holes: int32 [S]: the main row that each shadow row does not see.
        is_key: bool [S]: whether other shadow rows may see it.
        sees: int8 [S]: `ITSELF`, `ITS_BLOCK` or `ITS_PAIR`.
        spans: the sequences with shadow rows, on the host.
    """

    tiles: Tensor
    holes: Tensor
    is_key: Tensor
    sees: Tensor
    spans: tuple[ShadowSpan, ...]

    @cached_property
    def segments(self) -> tuple[ShadowSegment, ...]:
        """The shadow rows with masks, made at the first access."""
        segments = []
        for sequence, first_main, end_main, first, end, sees in self.spans:
            own, length = slice(first, end), end_main - first_main
            mask = shadow_mask(self.holes[own].long() - first_main, length, sees)
            if sees == ITS_BLOCK:
                mask[:, length:] &= self.is_key[own]
                mask[:, length:].fill_diagonal_(True)
            segments.append(ShadowSegment(sequence, (first, end), (first, end), mask))
        return tuple(segments)


@dataclass(frozen=True)
class DeviceLayout:
    """A layout in tensors on the device.

    Attributes:
        cu_queries, cu_keys: int32 [sequences + 1]: boundaries of the sequences among the main rows.
        max_queries, max_keys: maximum number of a sequence.
        shadows: the shadow rows; None: there are none.
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
        cu_queries: boundaries of the sequences in the main queries (number of sequences + 1).
        cu_keys: boundaries of the sequences in the main keys.
        shadows: the shadow rows, after the main rows in queries and keys; empty if there are none, or if
            `device` describes them.
        device: the layout on the device; None without static shapes.
        keys_of: the sequence of keys that each sequence of queries sees; None: they have the same numbers.
        kept: the kept rows (start, exclusive end) that each sequence of keys consists of, None where it
            consists of rows of the pack; None: all do.
    """

    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    shadows: tuple[ShadowSegment, ...]
    device: DeviceLayout | None = None
    keys_of: tuple[int, ...] | None = None
    kept: tuple[tuple[int, int] | None, ...] | None = None

    def keys(self, sequence: int) -> tuple[int, int, bool]:
        """The main keys of a sequence: start, exclusive end, and whether they are kept rows."""
        if self.kept is not None and (kept := self.kept[sequence]) is not None:
            return (*kept, True)
        return self.cu_keys[sequence], self.cu_keys[sequence + 1], False

    @property
    def segments(self) -> tuple[ShadowSegment, ...]:
        """Shadow rows of all sequences, with masks."""
        if self.device is None or self.device.shadows is None:
            return self.shadows
        return self.device.shadows.segments

    @cached_property
    def sequences(self) -> list[Run]:
        """A run for each sequence of queries."""
        keys_of = self.keys_of or range(len(self.cu_queries) - 1)
        return [
            Run(first, end - first, first_key, end_key - first_key, are_kept, 1)
            for (first, end), (first_key, end_key, are_kept) in zip(
                pairwise(self.cu_queries), map(self.keys, keys_of), strict=True
            )
        ]

    @cached_property
    def runs(self) -> list[Run]:
        """The sequences, as many in each run as possible."""
        runs: list[Run] = []
        for own in self.sequences:
            last = runs[-1] if runs else None
            kind = own.num_queries, own.num_keys, own.are_kept
            if (
                last is not None
                and (last.num_queries, last.num_keys, last.are_kept) == kind
                and last.first_key + last.count * last.num_keys == own.first_key
            ):
                runs[-1] = last._replace(count=last.count + 1)
            else:
                runs.append(own)
        return runs


class Run(NamedTuple):
    """Sequences with equal numbers of queries and keys, whose queries and keys follow each other."""

    first_query: int
    num_queries: int
    first_key: int
    num_keys: int
    are_kept: bool  # see `VarlenLayout.kept`
    count: int


def shadow_mask(holes_K: Tensor, length: int, sees: int) -> Tensor:
    """Mask of the shadow rows of a sequence over its main rows, then its shadow rows: bool [K, length + K].

    Args:
        holes_K: int64 [K]: the main row that each shadow row does not see.
        length: number of main rows.
        sees: see `ShadowSpan`; with `ITS_BLOCK` all rows are keys.
    """
    holes_K1 = holes_K.unsqueeze(1)
    mask = torch.ones(len(holes_K), length + len(holes_K), dtype=torch.bool, device=holes_K.device)
    mask.scatter_(1, holes_K1, False)
    if sees != ITS_BLOCK:
        mask[:, length:].fill_(False).fill_diagonal_(True)
    if sees == ITS_PAIR:
        mask[::2].scatter_(1, (holes_K1[::2] - 1).clamp(min=0), False)
        mask[::2, length + 1 :: 2].fill_diagonal_(True)
    return mask


class AttentionBackend(ABC):
    """Bidirectional attention over packed rows.

    Attributes:
        name: name in `attention_backend`.
        reads_device: whether it reads only the layout's `device`. A graph that captures it can then serve
            other canvases.
    """

    name: str
    reads_device: bool = False

    @abstractmethod
    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        """Attention output [Q, H, d] for queries [Q, H, d], keys and values [T, K, d] (H a multiple of K)."""

    def attend_kept(
        self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout, kept_2NKd: Tensor
    ) -> Tensor:
        """`attend` for a layout with `kept` rows, which are rows of `kept_2NKd`, this layer's kept keys and
        values [2, N, K, d]. Layouts with static shapes have none: their kept rows stand among the keys."""
        raise NotImplementedError(self.name)
