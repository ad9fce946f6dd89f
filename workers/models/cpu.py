"""Speed on CPUs: supported dtypes, kept memory and padded products."""

from __future__ import annotations

import torch

SMALL_ROWS = 256  # up to this number rows are padded to multiples of 16, above it to multiples of 32


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has fast kernels for a dtype; without them a CPU is some hundred times slower."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(dtype, lambda: True)()


def keep_freed_memory() -> None:
    """Lets the C library keep up to 64 MB of freed memory instead of returning it layer by layer.

    glibc raises its thresholds to the largest block (of at most 32 MB) that was ever freed. Without that,
    every forward takes page faults for all its activations.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def padded_len(num_rows: int) -> int:
    """Number of rows to which a product in bf16 or fp16 is padded.

    oneDNN prepares a kernel for each number of rows, which takes 3.5 ms and 0.3 MB, and caches those of 1,024
    products. Packs and candidates rarely have the same number of rows twice. With padding, packs of up to
    1,024 rows have 40 sizes, and the cache holds all their kernels.
    """
    step = 16 if num_rows <= SMALL_ROWS else 32
    return -(-num_rows // step) * step
