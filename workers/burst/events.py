"""What happened to the slots of traced canvases: kept as tensors for a burst, packed when it ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import EVENT, CanvasSpec
from remask.workers.tensors import HoldsTensors


class EventLog(HoldsTensors):
    """The commits and remaskings of a burst's traced canvases.

    Attributes:
        canvases: int64: which canvases of the burst are traced.
    """

    def __init__(self, specs: Sequence[CanvasSpec]) -> None:
        self._traced = [canvas for canvas, spec in enumerate(specs) if spec.trace]
        self.canvases = torch.tensor(self._traced, dtype=torch.int64)
        self._steps: list[tuple[Tensor, ...]] = []

    def add(
        self,
        *,
        step: Tensor,
        slots: Tensor,
        commit: Tensor,
        remask: Tensor,
        token: Tensor,
        confidence: Tensor,
    ) -> None:
        """One step of all canvases of the burst.

        Args:
            step: int64 [R]: the forward, counted from 1.
            slots: int64 [R, B].
            commit, remask: bool [R, B].
            token: int64 [R, B]: committed, or removed.
            confidence: fp32 [R, B]: of the commit, or what a token was remasked for.
        """
        when = step.unsqueeze(1).expand_as(slots)
        fields = (when, slots, token, confidence, commit, remask)
        self._steps.append(tuple(field[self.canvases] for field in fields))

    def taken(self) -> list[Tensor]:
        """The fields of all steps so far, [traced, steps, ...] each, which are forgotten; empty: none."""
        steps, self._steps = self._steps, []
        return [torch.stack(parts, 1) for parts in zip(*steps, strict=True)]

    def pack(self, taken: list[Tensor]) -> dict[int, bytes]:
        """EVENT records of each traced canvas, by step and slot; `taken` are on the host."""
        packed: dict[int, bytes] = {}
        if taken:
            fields = [part.numpy() for part in taken]
            for place, canvas in enumerate(self._traced):
                step, slot, token, confidence, commit, remask = (field[place] for field in fields)
                happened = commit | remask
                events = np.empty(int(happened.sum()), dtype=EVENT)
                for name, values in (
                    ("step", step),
                    ("slot", slot),
                    ("token", token),
                    ("confidence", confidence),
                    ("is_commit", commit),
                ):
                    events[name] = values[happened]
                packed[canvas] = events.tobytes()
        return packed
