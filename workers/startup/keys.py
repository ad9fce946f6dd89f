"""The number of rows whose keys and values a worker keeps."""

from __future__ import annotations

import os

from remask.workers.models.denoiser import Denoiser
from remask.workers.startup.memory import room_bytes

DEFAULT_BYTES = 4 << 30  # on a CPU
SHARE = 0.25  # of a machine's memory, or of what the weights leave of a GPU's


def max_key_rows(model: Denoiser, max_bytes: int | None, utilization: float) -> int:
    """Rows that fit a number of bytes; 0 for a model that keeps no keys.

    Args:
        model: as the worker runs it.
        max_bytes: the option; None: the default.
        utilization: share of a GPU's memory that this process may use, in (0, 1].
    """
    if not model.key_row_bytes:
        return 0
    if max_bytes is None and model.device.type == "cuda":
        max_bytes = int(SHARE * max(0, room_bytes(model.device, utilization)))
    elif max_bytes is None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        max_bytes = min(DEFAULT_BYTES, int(SHARE * total))
    return max_bytes // model.key_row_bytes
