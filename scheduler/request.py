"""A request inside the engine: the canvases of its samples, and when all of them have ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from remask.scheduler.canvas import Canvas


@dataclass
class Request:
    """One prompt with its n canvases, validated and ready to be scheduled.

    Attributes:
        arrival_time: monotonic seconds at which the engine took it.
        finish_time: monotonic seconds at which its last canvas finished; None before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    canvases: list[Canvas]
    ignore_eos: bool
    arrival_time: float
    finish_time: float | None = field(default=None)

    @property
    def finished(self) -> bool:
        return all(canvas.state.finished for canvas in self.canvases)
