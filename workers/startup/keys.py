"""The number of rows whose keys and values a worker keeps."""

from __future__ import annotations

import os

from remask.workers.models.denoiser import Denoiser

DEFAULT_BYTES = 4 << 30
SHARE = 0.25  # of a machine's memory


def max_key_rows(model: Denoiser, max_bytes: int | None) -> int:
    """Rows that fit a number of bytes; 0 for a model that keeps no keys.

    Args:
        model: as the worker runs it.
        max_bytes: the option; None: the default.
    """
    if not model.key_row_bytes:
        return 0
    if max_bytes is None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        max_bytes = min(DEFAULT_BYTES, int(SHARE * total))
    return max_bytes // model.key_row_bytes
