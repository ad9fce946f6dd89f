"""Random numbers that depend on what they are for, not on where or when they are drawn.

A number is a hash of (seed, sample, purpose, forward count of the canvas, canvas-relative position[, token
id]): the same in any batch, on any worker, in any burst and after a replay. The hash is SplitMix64 (Steele,
Lea, Flood 2014): a key is absorbed field by field, and token ids are the counter of the resulting stream, so
no tiling of the vocabulary changes them. int64 tensors hold the unsigned words; their arithmetic wraps.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64
MUL1 = 0xBF58476D1CE4E5B9 - 2**64
MUL2 = 0x94D049BB133111EB - 2**64
_UNIT = 2.0**-40  # uniforms have 40 bits before rounding to fp32, so that small ones keep their precision


class Purpose(IntEnum):
    """Streams that never meet."""

    TOKEN = 1
    ORDER = 2
    ACCEPT = 3
    REMASK = 4


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MUL1
    x = (x ^ _shift(x, 27)) * MUL2
    return x ^ _shift(x, 31)


def stream_keys(seed: Tensor, *fields: Tensor | int) -> Tensor:
    """64-bit keys from a seed and any number of integer fields, all broadcast together."""
    key = _mix(seed + GAMMA)
    for field in fields:
        key = _mix((key ^ field) + GAMMA)
    return key


def uniform(words: Tensor) -> Tensor:
    """fp32 in (0, 1) from 64-bit words; never 0 or 1."""
    return ((_shift(words, 24).double() + 0.5) * _UNIT).float().clamp(max=1 - 2.0**-24)


def uniform_at(keys: Tensor) -> Tensor:
    """One uniform number for each key."""
    return uniform(_mix(keys + GAMMA))


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel numbers fp32 [..., V] for keys [...] and token ids [V]."""
    words = _mix(keys.unsqueeze(-1) + (token_ids + 1) * GAMMA)
    return -torch.log(-torch.log1p(-uniform(words)))
