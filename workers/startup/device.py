"""Devices: the current GPU of a thread, and the name that measurements are stamped with."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one of this thread. Triton launches kernels, and torch captures graphs and
    records events, on the current GPU, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_name(device: torch.device) -> str:
    """The GPU's or CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
