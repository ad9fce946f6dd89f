"""The messages between the scheduler and a worker: msgspec structs that a remote executor encodes."""

from __future__ import annotations

from typing import Literal

import msgspec

from remask.scheduler.canvas import CanvasSpec, CanvasState


class StepBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A burst: up to `num_steps` denoising steps on these canvases.

    A burst may follow the previous burst of the worker. Then some canvases are not sent again: they continue
    from the state in which that burst leaves them.
    """

    burst_id: int
    num_steps: int  # maximum number of forwards; a canvas that finishes earlier takes fewer
    follows: int | None = None  # the burst that `states` refers to
    specs: list[CanvasSpec]
    states: list[CanvasState | int]  # one for each spec; a number is an index in the burst `follows`


class StepResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The canvases after up to `num_steps` steps, or the reason why the burst failed and changed nothing.

    A worker answers every burst, in order, and keeps running after a burst that did not fit its memory or
    raised an error. A burst that follows a failed one has no state to continue from: the worker skips it, and
    in turn those that follow it. A burst that follows none runs in any case.
    """

    burst_id: int
    states: list[CanvasState]  # one for each canvas; empty if the burst failed
    num_rows: int  # rows forwarded, all steps together
    seconds: float  # spent in the burst
    # EVENT records of the burst, by the index of a traced canvas; a canvas without events may be missing
    events: dict[int, bytes] = {}
    # "memory": it did not fit, a smaller one may; "error": it raised; "skipped": the burst it follows failed
    failure: Literal["memory", "error", "skipped"] | None = None
    error: str | None = None  # class and message of the exception
