"""The rules of scheduling as pure functions: the order of the queue, who shares a burst, its length.

`Scheduler` holds the live requests and calls these functions. They keep no state, so that each rule can be
tested alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from remask.scheduler.canvas import Canvas
from remask.scheduler.policies import tag

AGEING_SECONDS = 60.0  # of waiting make up for one priority class
MAX_BURST = 8  # steps: long enough to hide the host, short enough to admit new requests soon
BURST_SECONDS = 0.2  # longer bursts gain nothing: the host's share of one is negligible
# If workers launch a burst while another runs, a shorter one hides the host, and computes fewer rows of
# finished canvases.
OVERLAPPED_BURST_SECONDS = 0.05
WAITING_BURST_SECONDS = 0.05  # maximum while other canvases wait, but at least one step
MAX_PASSED = 32  # canvases to skip before the search for smaller ones ends
REGROW_AFTER = 64  # consecutive bursts that fit a worker's memory before its budget doubles

Order: TypeAlias = tuple[float, int]


class Budget(NamedTuple):
    """The maximum size of a burst. A canvas that exceeds it runs alone."""

    max_num_rows: int
    max_num_seqs: int
    max_key_rows: int = 1 << 62  # rows whose keys and values are kept


class Allowance(NamedTuple):
    """The budget of one worker: the engine's, or less after a burst that did not fit its memory."""

    budget: Budget
    num_fitting: int = 0  # consecutive bursts that fitted since the budget last changed


class Pace(NamedTuple):
    """The speed of a worker in its last burst."""

    step_seconds: float
    num_rows: int  # of a step

    def step_seconds_of(self, num_rows: int) -> float:
        """Estimated seconds of a step of `num_rows` rows: proportional for more rows, constant for fewer,
        because a small step waits for weights and not for arithmetic."""
        return self.step_seconds * max(1.0, num_rows / self.num_rows)


def order_of(priority: int, arrival_time: float, ordinal: int) -> Order:
    """The sort key of a canvas in the queue; the lowest runs first.

    The effective priority of a request is its priority less one for every `AGEING_SECONDS` that it has
    waited. All requests age at one rate, so their order never changes: the key is fixed on arrival, the queue
    is never sorted again, and a request of a low class waits for a bounded time.

    Args:
        priority: lower values are more urgent.
        arrival_time: monotonic seconds.
        ordinal: breaks ties; first come, first served.
    """
    return priority + arrival_time / AGEING_SECONDS, ordinal


def take(candidates: Iterable[Canvas], budget: Budget) -> tuple[list[Canvas], list[Canvas]]:
    """The first canvases of the queue that fit the budget (at least one), and those that were skipped.

    Later canvases may use the space that a canvas which does not fit leaves. This does not delay it: the next
    burst considers it before them again, and only canvases before it can keep it waiting.
    """
    taken: list[Canvas] = []
    passed: list[Canvas] = []
    num_rows = num_key_rows = 0
    for canvas in candidates:
        fits = num_rows + canvas.num_rows <= budget.max_num_rows
        if taken and not (fits and num_key_rows + canvas.num_key_rows <= budget.max_key_rows):
            passed.append(canvas)
        else:
            taken.append(canvas)
            num_rows += canvas.num_rows
            num_key_rows += canvas.num_key_rows
        full = len(taken) == budget.max_num_seqs or num_rows >= budget.max_num_rows
        if full or len(passed) == MAX_PASSED:
            break
    return taken, passed


def split(suspects: Sequence[Canvas]) -> tuple[list[Canvas], list[Canvas]]:
    """Splits suspected canvases into two groups; the first is empty if there is one canvas.

    Canvases that have never run are separated from the others first, because they are likelier to be at
    fault. Otherwise canvases with equal policies stay together: they may fail for the same reason.
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
    """The number of steps of a burst.

    It doubles with each burst without an arrival, within `max_seconds`, because no other worker can take the
    canvases of a burst. While ready canvases wait that did not fit, a burst lasts at most
    `WAITING_BURST_SECONDS`.

    Args:
        fixed: the number of steps that the user has set; None: adapt.
        others_wait: whether ready canvases did not fit.
        num_quiet: bursts since the last arrival.
        step_seconds: estimated seconds of a step; 0: unknown.
        max_seconds: maximum duration of a burst.
    """
    if fixed is not None:
        return fixed
    if others_wait:
        fitting = int(WAITING_BURST_SECONDS / step_seconds) if step_seconds > 0 else 1
        return max(1, min(MAX_BURST, fitting))
    fitting = int(max_seconds / step_seconds) if step_seconds > 0 else MAX_BURST
    return max(1, min(1 << min(num_quiet, 30), MAX_BURST, fitting))


def shrink(allowance: Allowance, *, num_rows: int, num_seqs: int) -> Allowance:
    """The allowance of a worker after a burst of this size did not fit its memory: at most half of it.

    A few consecutive failures thus lead to bursts of a single canvas. A canvas that failed alone does not
    reduce the number of canvases, because it says nothing about how many fit together.
    """
    rows, seqs, key_rows = allowance.budget
    rows = max(1, min(rows, num_rows // 2))
    return Allowance(Budget(rows, min(seqs, num_seqs // 2) if num_seqs > 1 else seqs, key_rows))


def regrow(allowance: Allowance, full: Budget) -> Allowance:
    """The allowance after a burst that fitted: doubled after `REGROW_AFTER` consecutive ones, up to `full`.

    Memory may be short only for a while, because other processes use the device. If it stays short, probing
    costs one failed burst in every `REGROW_AFTER`.
    """
    (rows, seqs, _), num_fitting = allowance.budget, allowance.num_fitting + 1
    if num_fitting < REGROW_AFTER:
        return Allowance(allowance.budget, num_fitting)
    rows, seqs = min(full.max_num_rows, 2 * rows), min(full.max_num_seqs, 2 * seqs)
    return Allowance(full._replace(max_num_rows=rows, max_num_seqs=seqs))
