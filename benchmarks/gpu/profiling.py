"""Profile of a step on a GPU: its kernels by time, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NUM_LISTED = 40
NAME_LEN = 110


def kernels_by_time(run: Callable[[], object], num_steps: int) -> dict[str, Any]:
    """Device time of each kernel, in milliseconds a step.

    Args:
        run: takes `num_steps` steps and waits for the device. Its first call is not counted.
        num_steps: steps of a call.
    """
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    per_step = 1000 * num_steps  # the profiler counts microseconds
    return {
        "kernel_ms": round(sum(event.self_device_time_total for event in kernels) / per_step, 3),
        "kernels_per_step": round(sum(event.count for event in kernels) / num_steps, 1),
        "kernels": [
            {
                "name": event.key[:NAME_LEN],
                "ms": round(event.self_device_time_total / per_step, 4),
                "calls": round(event.count / num_steps, 1),
            }
            for event in kernels[:NUM_LISTED]
        ],
    }
