"""Selects the attention backend of a worker: the requested one, or the fastest that supports the model."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import get_args

import torch

from remask.scheduler.errors import InvalidRequest
from remask.workers.attention.flash import FlashAttention
from remask.workers.attention.names import AttentionName
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import AttentionBackend

logger = logging.getLogger(__name__)

BACKENDS = tuple(name for name in get_args(AttentionName) if name != "auto")
# For each kernel: the first major compute capability that it supports, the first above that it does not, and
# the largest head dimension.
_SUPPORT = {"torch": (8, 99, 256), "flash2": (8, 12, 256), "flash3": (9, 10, 256), "flash4": (9, 12, 128)}
# The fastest first.
_PREFERENCE = {8: ("flash2", "torch"), 9: ("flash3", "flash4", "flash2", "torch"), 10: ("flash4", "torch")}
_INSTALL = {
    "flash2": "install flash-attn",
    "flash3": "install flash-attn-3",
    "flash4": "install flash-attn-4",
    "torch": "install torch 2.11 or newer",
}


def pick_attention(
    requested: str, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend for a model.

    Args:
        requested: "auto" or one of `BACKENDS`.
        device, dtype, head_dim: device of the model, dtype and head dimension of its queries.

    Raises:
        InvalidRequest: the requested backend is unknown, not installed, or does not support this model on
            this device.
    """
    if requested not in ("auto", *BACKENDS):
        fix = f"is not known; use auto or one of {', '.join(BACKENDS)}"
        raise InvalidRequest("attention_backend", requested, fix)
    if requested == "sdpa":
        return SdpaAttention()
    if requested != "auto":
        problem = _obstacle(requested, device, dtype, head_dim)
        if problem is None:
            try:
                return FlashAttention(requested)
            except Exception as error:  # kernel libraries raise various errors at import
                problem = f"cannot be loaded ({error}); {_INSTALL[requested]}, or use auto"
        raise InvalidRequest("attention_backend", requested, problem)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    for name in _PREFERENCE.get(min(major, max(_PREFERENCE)), ()):
        if _obstacle(name, device, dtype, head_dim) is None:
            try:
                return FlashAttention(name)
            except ModuleNotFoundError:
                continue
            except Exception as error:
                logger.warning("skipping attention backend %s: %s: %s", name, type(error).__name__, error)
    return SdpaAttention()


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel does not support a model; None if it does."""
    first, beyond, largest_head = _SUPPORT[name]
    if device.type != "cuda":
        return "runs on GPUs only; use auto or sdpa"
    major, minor = torch.cuda.get_device_capability(device)
    if not first <= major < beyond:
        return f"does not run on a GPU of compute capability {major}.{minor}; use auto"
    if dtype not in (torch.bfloat16, torch.float16):
        return "takes bfloat16 or float16; use one of these as dtype, or auto"
    if head_dim > largest_head or head_dim % 8:
        return f"takes heads of up to {largest_head} dimensions, a multiple of 8; the model's have {head_dim}"
    if find_spec("triton") is None:
        return "needs Triton for the rows that verify; install triton, or use sdpa"
    return None
