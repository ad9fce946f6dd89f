"""The rules of scheduling as pure functions: who goes before whom, who shares a burst, how long it is.

`Scheduler` holds the live requests and asks here. Nothing in this file keeps state, so every rule can be
tested by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from remask.scheduler.canvas import Canvas

AGEING_SECONDS = 60.0  # a request that has waited so much longer overtakes one priority class
MAX_BURST = 8  # steps: long enough to hide the host, short enough to let newcomers in

Order: TypeAlias = tuple[float, int]


class Budget(NamedTuple):
    """What a burst may hold; one canvas that is larger runs alone."""

    max_num_rows: int
    max_num_seqs: int


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


def take(candidates: Iterable[Canvas], budget: Budget) -> list[Canvas]:
    """The longest beginning of the queue that fits the budget, at least one canvas.

    Nobody overtakes a canvas that does not fit: the room left over is worth less than its turn.
    """
    taken: list[Canvas] = []
    num_rows = 0
    for canvas in candidates:
        num_rows += canvas.num_rows
        if taken and (num_rows > budget.max_num_rows or len(taken) == budget.max_num_seqs):
            break
        taken.append(canvas)
    return taken


def burst_len(fixed: int | None, *, others_wait: bool, num_quiet: int) -> int:
    """Steps of a burst: 1 while others wait for a place, then doubling as long as nobody arrives.

    Args:
        fixed: what the user asked for; None: adapt.
        others_wait: whether somebody is ready who did not fit.
        num_quiet: bursts since the last arrival.
    """
    if fixed is not None:
        return fixed
    return 1 if others_wait else min(1 << min(num_quiet, 30), MAX_BURST)
