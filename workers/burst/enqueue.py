"""Enqueues the steps of a burst on a device, a few before the device takes them.

If the host enqueued a whole burst at once, the device would take all steps even after every canvas has
paused. So the host stays at most `AHEAD_STEPS` ahead, which is enough for the device never to wait, and reads
a flag that each step sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AHEAD_STEPS = 2


class StepQueue:
    """The steps of a burst.

    Args:
        step: enqueues one step and returns the rows that it forwards.
        num_steps: maximum number of steps.
        paused_R: bool [R] on the device: the canvases that take no more steps.

    Attributes:
        num_rows: rows forwarded by the steps enqueued so far.
        all_paused: whether no canvas takes another step.
    """

    def __init__(self, step: Callable[[], int], num_steps: int, paused_R: Tensor) -> None:
        self._step, self._num_steps, self._paused = step, num_steps, paused_R
        self.num_rows, self.all_paused = 0, False
        self._events: list[torch.cuda.Event | None] = []
        self._flags = torch.zeros(num_steps, dtype=torch.bool, pin_memory=paused_R.is_cuda)

    def enqueue_first(self) -> None:
        """Enqueues the first `AHEAD_STEPS` steps, without waiting for the device."""
        for _ in range(min(AHEAD_STEPS, self._num_steps)):
            self._enqueue()

    def enqueue_rest(self) -> None:
        """Enqueues the other steps until all canvases have paused, `AHEAD_STEPS` ahead of the device."""
        while len(self._events) < self._num_steps and not self.all_paused:
            place = len(self._events) - AHEAD_STEPS
            event = self._events[place]
            if event is not None:
                event.synchronize()
            self.all_paused = bool(self._flags[place])
            if not self.all_paused:
                self._enqueue()

    def _enqueue(self) -> None:
        self.num_rows += self._step()
        flag = self._flags[len(self._events)]
        flag.copy_(self._paused.all(), non_blocking=True)
        event = torch.cuda.Event() if self._paused.is_cuda else None
        if event is not None:
            event.record()
        self._events.append(event)
