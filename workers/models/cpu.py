"""What CPUs need to be fast: dtypes that they multiply, memory that is kept, and products of few sizes."""

from __future__ import annotations

import torch

SMALL_ROWS = 256  # up to which rows are padded to multiples of 16, beyond of 32


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has kernels for a dtype; without them a CPU takes some hundred times as long."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(dtype, lambda: True)()


def keep_freed_memory() -> None:
    """Lets the C library keep up to 64 MB of freed memory instead of returning it layer by layer.

    glibc raises its thresholds to the largest block (of at most 32 MB) that was ever freed; until then every
    forward faults all its activations in again.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def padded_len(num_rows: int) -> int:
    """Rows that a product in bf16 or fp16 is padded to.

    oneDNN prepares a kernel for each number of rows that it meets, which takes 3.5 ms and 0.3 MB, and keeps
    those of 1,024 products. Packs and candidates rarely have the same number of rows twice. Padded, packs of
    up to 1,024 rows have 40 sizes, so that all their kernels are kept.
    """
    step = 16 if num_rows <= SMALL_ROWS else 32
    return -(-num_rows // step) * step
