"""A request inside the engine: one prompt and the canvases of its samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from remask.scheduler.canvas import Canvas, CanvasState, TextStop
from remask.scheduler.errors import RemaskError


@dataclass
class Request:
    """One prompt with its n canvases, validated and ready to be scheduled.

    Attributes:
        priority: lower values run first.
        stop: stop strings.
        find_stop: searches the finished blocks of a canvas, which pauses at the end of each, for a stop
            string; None: the request has none.
        stop_token_ids: ids that end a text besides the model's own.
        include_stop_in_text: whether the text keeps the stop string or token.
        logprobs: whether the output has log-probabilities.
        trace: whether the output has the events of its canvases.
        arrival_time: monotonic seconds when the engine accepted it.
        finish_time: monotonic seconds when its last canvas finished; None before.
        num_open: canvases that have not finished.
        weights_version: version of the weights that it runs on.
        failure: the error that ended the request; None if it has finished or is live.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    canvases: list[Canvas]
    priority: int
    stop_token_ids: Collection[int]
    include_stop_in_text: bool
    logprobs: bool
    trace: bool
    stop: Sequence[str]
    find_stop: Callable[[Canvas, CanvasState], TextStop | None] | None
    arrival_time: float
    finish_time: float | None = field(default=None)
    failure: RemaskError | None = field(default=None)
    weights_version: int = field(default=0)
    num_open: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_open = len(self.canvases)

    @property
    def num_canvas_tokens(self) -> int:
        """Total slots of its canvases."""
        return sum(canvas.spec.canvas_len for canvas in self.canvases)

    @property
    def has_started(self) -> bool:
        """Whether a canvas has taken a step, or may have."""
        return not all(canvas.queued and canvas.state.num_forwards == 0 for canvas in self.canvases)

    @property
    def error(self) -> str | None:
        """The message of the failure."""
        return str(self.failure) if self.failure is not None else None

    def record_events(self) -> None:
        """Records the events of its canvases for a stream. Nothing of the request has run yet."""
        for canvas in self.canvases:
            canvas.spec = msgspec.structs.replace(canvas.spec, trace=True)

    def settle(self, canvas: Canvas, state: CanvasState) -> CanvasState:
        """The state of a canvas after a burst, marked as finished if a block has completed a stop string."""
        if self.find_stop is None or state.block == canvas.state.block:
            return state
        canvas.text_stop = self.find_stop(canvas, state)
        return state if canvas.text_stop is None else msgspec.structs.replace(state, finished=True)
