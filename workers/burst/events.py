"""The commits and remaskings of traced canvases: tensors during a burst, packed into bytes when it ends."""

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
        canvases: int64: indices of the traced canvases of the burst.
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
        is_top: Tensor,
    ) -> None:
        """One step of all canvases of the burst.

        Args:
            step: int64 [R]: the forward, counted from 1.
            slots: int64 [R, B].
            commit, remask: bool [R, B].
            token: int64 [R, B]: committed, or removed.
            confidence: fp32 [R, B]: of the commit, or the probability for which a token was remasked.
            is_top: bool [R, B]: whether the proposal is the most probable token.
        """
        when = step.unsqueeze(1).expand_as(slots)
        fields = (when, slots, token, confidence, commit, remask, is_top & commit)
        self._steps.append(tuple(field[self.canvases] for field in fields))

    def taken(self) -> list[Tensor]:
        """Removes and returns the fields of all steps so far, [traced, steps, ...] each; empty: none."""
        steps, self._steps = self._steps, []
        return [torch.stack(parts, 1) for parts in zip(*steps, strict=True)]

    def pack(self, taken: list[Tensor]) -> dict[int, bytes]:
        """EVENT records of each traced canvas, by step and slot; `taken` are on the host."""
        packed: dict[int, bytes] = {}
        if taken:
            fields = [part.numpy() for part in taken]
            for place, canvas in enumerate(self._traced):
                step, slot, token, confidence, commit, remask, is_top = (field[place] for field in fields)
                happened = commit | remask
                events = np.empty(int(happened.sum()), dtype=EVENT)
                for name, values in (
                    ("step", step),
                    ("slot", slot),
                    ("token", token),
                    ("confidence", confidence),
                    ("is_commit", commit),
                    ("is_top", is_top),
                ):
                    events[name] = values[happened]
                packed[canvas] = events.tobytes()
        return packed
