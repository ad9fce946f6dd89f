"""What the errors of a burst mean: too little memory, a lost GPU, or anything else."""

from __future__ import annotations

import torch

# What errors say that are not of a class of their own: the CUDA driver, Triton and pinned memory; torch's
# allocator on the CPU; libraries that could not make their workspace.
MESSAGES = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

MAX_ERROR_LEN = 500  # characters of an error that travel
# What errors say that lose a CUDA context: no later call of the process can use the GPU.
LOST_MESSAGES = ("CUDA error", "device-side assert", "CUBLAS_STATUS_EXECUTION_FAILED", "uncorrectable ECC")


def message_of(error: BaseException) -> str:
    """What an error says, as text that UTF-8 can hold; nothing if the error's own code fails at that."""
    try:
        return str(error).encode(errors="replace").decode()
    except Exception:
        return ""


def describe(error: BaseException) -> str:
    """The class and the message of an error, cut to `MAX_ERROR_LEN` characters."""
    return f"{type(error).__name__}: {message_of(error)}"[:MAX_ERROR_LEN]


def loses_device(error: BaseException) -> bool:
    """Whether an error has lost the GPU for this process. One of memory has not."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(part in message_of(error) for part in LOST_MESSAGES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, so that a smaller burst may go through.

    A kernel that asks for more shared memory than a GPU's core has is no such error: it never fits.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in message_of(error) for part in MESSAGES)
