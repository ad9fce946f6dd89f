"""Tile sizes of the head's and the shadow rows' kernels, by what a GPU's multiprocessors are made of.

Sizes change a row's numbers by roundings only. They depend on the GPU and the dtype, never on the rows, so
that on one GPU a row has the same numbers in any company.
"""

# Triton's modules and drivers have what their annotations do not say.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton


class HeadSizes(NamedTuple):
    """Sizes of a program that multiplies [tile_n, D] by [D, tile_v].

    Attributes:
        tile_n, tile_v: rows and ids of a tile.
        tile_bytes: bytes of each row and id that a step of the product loads.
        parts: parts of a tile's ids that the softmax takes one after another: the more, the fewer registers.
        num_warps, num_stages: of Triton.
        max_registers: of a thread; None: the compiler's choice.
    """

    tile_n: int
    tile_v: int
    tile_bytes: int
    parts: int
    num_warps: int
    num_stages: int
    max_registers: int | None


class AttentionSizes(NamedTuple):
    """Sizes of a program that goes over the keys of 32 shadow rows, `keys` at a time."""

    keys: int
    num_warps: int
    num_stages: int


# Hopper and data-center Blackwell. The product's sums are spread evenly over two groups of four warps. Three
# stages are 96 KiB and 128 registers are allowed, so that two programs fit a multiprocessor: one does its
# softmax while the other multiplies.
_WARP_GROUPS = HeadSizes(128, 128, 128, parts=4, num_warps=8, num_stages=3, max_registers=128)
# All others: a thread holds twice as many rows, and 128 registers would be too few for them. One program
# fits a multiprocessor. Tiles of fewer rows would let in two, but read the weights twice as often from the
# second-level cache. The 64 KiB of shared memory fit each of these GPUs.
_WARPS = HeadSizes(128, 128, 128, parts=8, num_warps=8, num_stages=3, max_registers=None)
# fp32 is multiplied without tensor cores.
_FP32 = HeadSizes(64, 128, 128, parts=8, num_warps=8, num_stages=3, max_registers=None)

# By major compute capability; None: Triton's interpreter.
_HEAD = {9: _WARP_GROUPS, 10: _WARP_GROUPS, None: _WARP_GROUPS}

# 32 queries are too few for Hopper's warp-group products (64 rows), so these are the older warp-wide ones on
# all GPUs, and four warps share out the keys. Their registers admit two programs to a multiprocessor, and so
# do three stages of loads (76 KiB at 128 dimensions in bf16).
_ATTENTION = AttentionSizes(keys=64, num_warps=4, num_stages=3)
# fp32 needs twice the space, and fewer than eight warps would spill, as would more keys on older GPUs and
# fewer on Hopper.
_ATTENTION_IN_FP32 = {major: AttentionSizes(keys=64, num_warps=8, num_stages=2) for major in _HEAD}
_OLDER_ATTENTION_IN_FP32 = AttentionSizes(keys=32, num_warps=8, num_stages=2)


def head_sizes(*, is_fp32: bool) -> HeadSizes:
    """For the current GPU; in Triton's interpreter those of Hopper."""
    major = _major_capability()
    return _FP32 if is_fp32 and major is not None else _HEAD.get(major, _WARPS)


def attention_sizes(*, is_fp32: bool) -> AttentionSizes:
    """For the current GPU; in Triton's interpreter those of Hopper."""
    major = _major_capability()
    return _ATTENTION_IN_FP32.get(major, _OLDER_ATTENTION_IN_FP32) if is_fp32 else _ATTENTION


def _major_capability() -> int | None:
    """Of the current GPU; None in the interpreter, and 0 for what is not Nvidia's."""
    if triton.knobs.runtime.interpret:
        return None
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch // 10 if isinstance(arch, int) else 0
