"""What goes to a worker and comes back. Plain msgspec structs: a remote executor encodes them as they are."""

from __future__ import annotations

from typing import Literal

import msgspec

from remask.scheduler.canvas import CanvasSpec, CanvasState


class StepBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A burst: up to `num_steps` denoising steps on these canvases.

    A burst may follow the worker's burst before it: then some canvases are not sent again but go on from
    where that one leaves them.
    """

    burst_id: int
    num_steps: int  # forwards at most; a canvas that finishes earlier takes no more
    follows: int | None = None  # the burst that `states` refers to
    specs: list[CanvasSpec]
    states: list[CanvasState | int]  # one for each spec; a number is a place in the burst `follows`


class StepResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same canvases, up to `num_steps` further; or word that the burst failed and changed nothing.

    A worker answers every burst, in order, and lives on after one that did not fit its memory or raised an
    error. A burst that follows a failed one has nothing to go on from: the worker does not run it and answers
    "skipped", and so with those that follow it in turn. One that follows nothing runs, whatever came before.
    """

    burst_id: int
    states: list[CanvasState]  # one for each canvas; none where it failed
    num_rows: int  # rows forwarded, all steps together
    seconds: float  # spent in the burst
    # EVENT records of the burst, by the place of a traced canvas; a canvas without events may be missing
    events: dict[int, bytes] = {}
    # "memory": it did not fit, a smaller one may; "error": it raised; "skipped": what it follows failed
    failure: Literal["memory", "error", "skipped"] | None = None
    error: str | None = None  # class and message of what it raised
