"""Tile sizes of the kernels of the head, of shadow attention and of experts, by compute capability.

Sizes change a row's numbers only by rounding. They depend on the GPU and the dtype, not on the rows, so a
row's numbers on one GPU do not depend on the other rows.
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
        tile_bytes: bytes of each row and id that one iteration of the product loads.
        parts: number of parts of a tile's ids that the softmax processes in turn; more parts need fewer
            registers.
        num_warps, num_stages: launch options of Triton.
        max_registers: maximum registers of a thread; None: the compiler's choice.
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


class ExpertSizes(NamedTuple):
    """Sizes of a program that multiplies some pairs of a row and an expert by some of the expert's outputs.

    Attributes:
        tile_pairs, tile_outputs: pairs and outputs of a tile.
        tile_bytes: bytes of each pair and output that one iteration of the product loads.
        num_warps, num_stages: launch options of Triton.
    """

    tile_pairs: int
    tile_outputs: int
    tile_bytes: int
    num_warps: int
    num_stages: int


# Hopper and data-center Blackwell. Two groups of four warps share the accumulators. Three stages take 96 KiB
# and registers are limited to 128, so that two programs fit a multiprocessor: one computes its softmax while
# the other multiplies.
_WARP_GROUPS = HeadSizes(128, 128, 128, parts=4, num_warps=8, num_stages=3, max_registers=128)
# All others. A thread holds twice as many rows and needs more than 128 registers, so one program fits a
# multiprocessor. With smaller tiles two would fit, but they would read the weights from the L2 cache twice as
# often. The 64 KiB of shared memory fit every one of these GPUs.
_WARPS = HeadSizes(128, 128, 128, parts=8, num_warps=8, num_stages=3, max_registers=None)
# fp32 is multiplied without tensor cores.
_FP32 = HeadSizes(64, 128, 128, parts=8, num_warps=8, num_stages=3, max_registers=None)

# By major compute capability; None: Triton's interpreter.
_HEAD = {9: _WARP_GROUPS, 10: _WARP_GROUPS, None: _WARP_GROUPS}

# 32 queries are too few for Hopper's warp-group products (64 rows), so all GPUs use warp-wide products, and
# four warps divide the keys. Registers and three stages of loads (76 KiB at 128 dimensions in bf16) let two
# programs fit a multiprocessor.
_ATTENTION = AttentionSizes(keys=64, num_warps=4, num_stages=3)
# fp32 needs twice the space. Fewer than eight warps spill registers; so do more keys on older GPUs and fewer
# on Hopper.
_ATTENTION_IN_FP32 = {major: AttentionSizes(keys=64, num_warps=8, num_stages=2) for major in _HEAD}
_OLDER_ATTENTION_IN_FP32 = AttentionSizes(keys=32, num_warps=8, num_stages=2)

# 64 pairs are what Hopper's warp-group products take, and few enough for experts with few rows. Three stages
# of loads take 72 KiB, which fits every GPU.
_EXPERTS = ExpertSizes(tile_pairs=64, tile_outputs=128, tile_bytes=128, num_warps=4, num_stages=3)
# fp32 is multiplied without tensor cores, and its sums are divided among twice as many threads.
_EXPERTS_IN_FP32 = _EXPERTS._replace(num_warps=8)


def head_sizes(*, is_fp32: bool) -> HeadSizes:
    """For the current GPU; in Triton's interpreter those of Hopper."""
    major = _major_capability()
    return _FP32 if is_fp32 and major is not None else _HEAD.get(major, _WARPS)


def attention_sizes(*, is_fp32: bool) -> AttentionSizes:
    """For the current GPU; in Triton's interpreter those of Hopper."""
    major = _major_capability()
    return _ATTENTION_IN_FP32.get(major, _OLDER_ATTENTION_IN_FP32) if is_fp32 else _ATTENTION


def expert_sizes(*, is_fp32: bool) -> ExpertSizes:
    """For all GPUs."""
    return _EXPERTS_IN_FP32 if is_fp32 else _EXPERTS


def _major_capability() -> int | None:
    """Major compute capability of the current GPU; None in the interpreter, 0 if the GPU is not Nvidia's."""
    if triton.knobs.runtime.interpret:
        return None
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch // 10 if isinstance(arch, int) else 0
