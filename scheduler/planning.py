"""The rules of scheduling as pure functions: who goes before whom, who shares a burst, how long it is.

`Scheduler` holds the live requests and asks here. Nothing in this file keeps state, so every rule can be
tested by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from remask.scheduler.canvas import Canvas
from remask.scheduler.policies import tag

AGEING_SECONDS = 60.0  # a request that has waited so much longer overtakes one priority class
MAX_BURST = 8  # steps: long enough to hide the host, short enough to let newcomers in
BURST_SECONDS = 0.2  # a burst gets no longer for the sake of the host, whose share is lost in it
# If workers launch a burst while another runs, a shorter one hides the host, and computes fewer rows of
# canvases that have ended.
OVERLAPPED_BURST_SECONDS = 0.05
WAITING_BURST_SECONDS = 0.05  # while others wait for a place; they wait for a step in any case
MAX_PASSED = 32  # canvases that do not fit before the search for smaller ones ends
REGROW_AFTER = 64  # bursts in a row that fit a worker's memory before it gets larger ones again

Order: TypeAlias = tuple[float, int]


class Budget(NamedTuple):
    """What a burst may hold; one canvas that is larger runs alone."""

    max_num_rows: int
    max_num_seqs: int


class Allowance(NamedTuple):
    """What a worker gets: the engine's budget, or less after a burst that did not fit its memory."""

    budget: Budget
    num_fitting: int = 0  # bursts in a row that fitted since the budget last changed


class Pace(NamedTuple):
    """How fast a worker was in its last burst."""

    step_seconds: float
    num_rows: int  # of a step

    def step_seconds_of(self, num_rows: int) -> float:
        """Seconds of a step of that many rows: in proportion if they are more. Not less if they are fewer: a
        small step waits for weights and not for arithmetic."""
        return self.step_seconds * max(1.0, num_rows / self.num_rows)


def order_of(priority: int, arrival_time: float, ordinal: int) -> Order:
    """The place in the queue: the lower goes first.

    A request's standing is its priority less one class for every `AGEING_SECONDS` it has waited. All age at
    the same rate, so who precedes whom never changes: the key is fixed on arrival, a queue need not be sorted
    again, and a lower class waits for a bounded time however many of a higher class arrive.

    Args:
        priority: the lower, the more urgent.
        arrival_time: monotonic seconds.
        ordinal: breaks ties; first come, first served.
    """
    return priority + arrival_time / AGEING_SECONDS, ordinal


def take(candidates: Iterable[Canvas], budget: Budget) -> tuple[list[Canvas], list[Canvas]]:
    """The first of the queue that fit the budget, at least one canvas, and those that were passed over.

    A canvas that does not fit lets later ones use the room that is left. That costs it nothing: nobody holds
    a place, the next burst asks it again before them, and only those before it can keep it waiting.
    """
    taken: list[Canvas] = []
    passed: list[Canvas] = []
    num_rows = 0
    for canvas in candidates:
        if taken and num_rows + canvas.num_rows > budget.max_num_rows:
            passed.append(canvas)
        else:
            taken.append(canvas)
            num_rows += canvas.num_rows
        full = len(taken) == budget.max_num_seqs or num_rows >= budget.max_num_rows
        if full or len(passed) == MAX_PASSED:
            break
    return taken, passed


def split(suspects: Sequence[Canvas]) -> tuple[list[Canvas], list[Canvas]]:
    """Two groups of suspected canvases; the first is empty if there is only one.

    Who has never run is suspected before who has, so the two kinds are told apart first. Among equals, those
    of a policy stand side by side: what one canvas fails of, others with its policy may fail of.
    """
    fresh = [canvas for canvas in suspects if not canvas.state.num_forwards]
    proven = [canvas for canvas in suspects if canvas.state.num_forwards]
    if fresh and proven:
        return fresh, proven
    same = sorted(suspects, key=lambda canvas: [tag(policy) for policy in canvas.spec.policies])
    half = len(same) // 2
    return same[:half], same[half:]


def burst_len(
    fixed: int | None,
    *,
    others_wait: bool,
    num_quiet: int,
    step_seconds: float,
    max_seconds: float = BURST_SECONDS,
) -> int:
    """Steps of a burst: doubling as long as nobody arrives, and no more than fit `max_seconds`, because no
    other worker can take the canvases of a burst. While others wait for a place: as many as are over in
    `WAITING_BURST_SECONDS`.

    Args:
        fixed: what the user asked for; None: adapt.
        others_wait: whether somebody is ready who did not fit.
        num_quiet: bursts since the last arrival.
        step_seconds: what a step is expected to take; 0: not known.
        max_seconds: how long a burst may last.
    """
    if fixed is not None:
        return fixed
    if others_wait:
        fitting = int(WAITING_BURST_SECONDS / step_seconds) if step_seconds > 0 else 1
        return max(1, min(MAX_BURST, fitting))
    fitting = int(max_seconds / step_seconds) if step_seconds > 0 else MAX_BURST
    return max(1, min(1 << min(num_quiet, 30), MAX_BURST, fitting))


def shrink(allowance: Allowance, *, num_rows: int, num_seqs: int) -> Allowance:
    """What a worker gets after a burst of that size did not fit its memory: at most half of it.

    So a few failures in a row lead to bursts of a single canvas, whatever it is that does not fit. A canvas
    that failed alone says nothing about how many fit together.
    """
    rows, seqs = allowance.budget
    rows = max(1, min(rows, num_rows // 2))
    return Allowance(Budget(rows, min(seqs, num_seqs // 2) if num_seqs > 1 else seqs))


def regrow(allowance: Allowance, full: Budget) -> Allowance:
    """What a worker gets after one that fitted: after `REGROW_AFTER` in a row twice as much, up to `full`.

    Memory may be short for a while only, because others use the device; and where it stays short, one burst
    in so many is lost on finding out.
    """
    (rows, seqs), num_fitting = allowance.budget, allowance.num_fitting + 1
    if num_fitting < REGROW_AFTER:
        return Allowance(allowance.budget, num_fitting)
    return Allowance(Budget(min(full.max_num_rows, 2 * rows), min(full.max_num_seqs, 2 * seqs)))
