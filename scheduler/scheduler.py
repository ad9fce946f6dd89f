"""The scheduler: the live requests, their canvases, and the bursts in flight.

The scheduler owns every canvas; a worker borrows it for a burst. A canvas is *ready* (it waits in the queue),
*in flight* (it is in a burst, and perhaps in bursts that continue it), or *ended*. No canvas keeps a place
between bursts: each burst takes the first canvases of the queue. So running canvases keep running, and an
urgent request preempts the last of them at no cost but their turn.

A burst fails if its worker dies, if it raises an error, or if it does not fit the worker's memory. `Blame`
then determines which of its canvases run apart from all others, and which request is at fault. After a burst
that did not fit, the worker gets smaller bursts for a while. A canvas that does not fit alone, twice, ends
its request; the worker's memory was not short then, and its bursts grow again.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from remask.scheduler.blame import FAULTS, RAISED, Blame
from remask.scheduler.canvas import Canvas
from remask.scheduler.errors import EngineDead, RemaskError, RequestFailed
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.planning import (
    BURST_SECONDS,
    Allowance,
    Budget,
    Pace,
    burst_len,
    order_of,
    regrow,
    shrink,
    take,
)
from remask.scheduler.ready import ReadyQueue
from remask.scheduler.request import Request

DEAD = "every burst fails with {}; make a new engine"


@dataclass
class _Burst:
    """A burst in flight. A worker runs its bursts one after another."""

    worker: int
    canvases: list[Canvas]
    num_steps: int
    follows: int | None  # the burst whose canvases it continues
    apart: bool  # its canvases are suspected, or it is a probe: the worker has no other burst
    doomed: bool = False  # the burst it follows has failed: it will be skipped
    is_probe: bool = False


class Scheduler:
    """Cuts bursts from a queue of canvases and applies their results.

    Args:
        max_num_rows: maximum rows of a forward; a larger canvas runs alone. A worker that is short of memory
            gets fewer.
        max_num_seqs: maximum canvases of a burst.
        burst: denoising steps of a burst; None: see `planning.burst_len`.
        probe: a canvas of one token.
        burst_seconds: maximum duration of a burst if `burst` is None.
        max_key_rows: maximum rows whose keys and values a worker keeps; None: no limit.
        continues_reuse: whether a burst may continue canvases that reuse keys; else their state is sent.

    Attributes:
        moved: the canvases that the last result has changed, including those that it ended.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_seqs: int,
        burst: int | None,
        probe: Canvas,
        burst_seconds: float = BURST_SECONDS,
        max_key_rows: int | None = None,
        continues_reuse: bool = True,
    ) -> None:
        self._continues_reuse = continues_reuse
        self._probe, self._burst_seconds = probe, burst_seconds
        self._budget, self._burst_len = Budget(max_num_rows, max_num_seqs), burst
        if max_key_rows is not None:
            self._budget = self._budget._replace(max_key_rows=max_key_rows)
        self._allowances = defaultdict[int, Allowance](lambda: Allowance(self._budget))  # by worker
        self._requests: dict[str, Request] = {}
        self._holds, self._aside = False, dict[str, Request]()  # what waits for `release`
        self._ready, self._blame = ReadyQueue(), Blame()
        self._bursts: dict[int, _Burst] = {}  # in the order in which they were cut
        self._tails: dict[int, int] = {}  # worker -> its last burst, while that is in flight
        self._burst_ids = itertools.count()
        self._num_quiet = 0  # bursts since the last arrival
        self._paces: dict[int, Pace] = {}  # by worker
        self.moved: list[Canvas] = []

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests) + self._blame.num_accused

    @property
    def num_held(self) -> int:
        """Canvases in the queue and in bursts in flight, including those of aborted requests."""
        in_bursts = sum(len(burst.canvases) for burst in self._bursts.values())
        return self._ready.num_held + in_bursts + self._blame.num_suspects

    def add(self, request: Request) -> None:
        """Adds a request; its canvases may join the next burst."""
        self._requests[request.request_id] = request
        self._num_quiet = 0
        for canvas in request.canvases:
            canvas.order = order_of(request.priority, request.arrival_time, canvas.ordinal)
        if self._holds:
            self._aside[request.request_id] = request
        else:
            self._push(request)

    def hold(self) -> None:
        """Lets no further request start until `release`. Those that have started go on."""
        self._holds = True
        self._aside = {own.request_id: own for own in self._requests.values() if not own.has_started}
        self._ready.take_out(self._aside)

    @property
    def is_drained(self) -> bool:
        """Whether `hold` was called and nothing runs any more."""
        is_idle = not (self._bursts or self._is_probing())
        return self._holds and is_idle and len(self._aside) == len(self._requests)

    def release(self) -> list[Request]:
        """Ends `hold`; returns the requests that it has held back."""
        held, self._holds, self._aside = list(self._aside.values()), False, {}
        for request in held:
            self._push(request)
        return held

    def _push(self, request: Request) -> None:
        for canvas in request.canvases:
            self._ready.push(canvas)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests in any state. Results of bursts in flight are ignored for them.

        Ids that are not live are ignored, because a request may end just before it is aborted.
        """
        request_ids = set(request_ids)
        self._blame.forget(request_ids)
        num_queued = 0
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            self._aside.pop(request_id, None)
            for canvas in request.canvases if request is not None else ():
                canvas.aborted = True
                num_queued += canvas.queued
        self._ready.note_aborted(num_queued)

    def next_batch(self, worker: int = 0, *, num_idle: int = 0) -> StepBatch | None:
        """The next burst for a worker; None if there is no work for it.

        While a burst of the worker is in flight, the new one may *continue* its canvases: it refers to them
        by their index in that burst, and the worker continues from the state in which that burst leaves them.

        Args:
            worker: number of the worker.
            num_idle: number of other idle workers; a share of the canvases is left for each.
        """
        follows, before, running = self._tails.get(worker), list[Canvas](), list[Canvas]()
        if follows is not None:
            tail = self._bursts[follows]
            if self._blame.has_suspects or tail.apart:
                return None  # a worker that dies may lose the result of its previous burst
            if tail.doomed:
                return None  # a burst that follows it would be skipped
            before = tail.canvases
            running = [c for c in before if c.goes_on and (self._continues_reuse or not c.num_key_rows)]
        if self._blame.wants_probe and follows is None:
            return self._cut_probe(worker)
        budget = self._allowances[worker].budget
        suspects = self._blame.next_group(budget) if not self._is_probing() else []
        taken = suspects or self._take(worker, budget, running, num_idle)
        if not taken:
            return None
        places = {id(canvas): place for place, canvas in enumerate(before)}
        continued = sum(id(canvas) in places for canvas in taken)
        others_wait = self._ready.first([None, worker]) is not None or continued < len(running)
        burst_id = self._tails[worker] = next(self._burst_ids)
        pace = self._paces.get(worker)
        num_steps = burst_len(
            self._burst_len,
            others_wait=others_wait,
            num_quiet=self._num_quiet,
            step_seconds=pace.step_seconds_of(sum(c.num_rows for c in taken)) if pace is not None else 0.0,
            max_seconds=self._burst_seconds,
        )
        follows = follows if continued else None
        self._bursts[burst_id] = _Burst(worker, taken, num_steps, follows, apart=bool(suspects))
        for canvas in taken:
            canvas.last_burst = burst_id
        batch = StepBatch(
            burst_id=burst_id,
            num_steps=num_steps,
            follows=follows,
            specs=[canvas.spec for canvas in taken],
            states=[places.get(id(canvas), canvas.state) for canvas in taken],
        )
        self._num_quiet += 1
        return batch

    def _is_probing(self) -> bool:
        """Whether a probe must run or is in flight; suspects wait for its result."""
        return self._blame.wants_probe or any(burst.is_probe for burst in self._bursts.values())

    def _cut_probe(self, worker: int) -> StepBatch:
        """A burst with the probe alone."""
        burst_id = self._tails[worker] = next(self._burst_ids)
        self._bursts[burst_id] = _Burst(worker, [], 1, None, apart=True, is_probe=True)
        self._blame.wants_probe = False
        return StepBatch(burst_id=burst_id, num_steps=1, specs=[self._probe.spec], states=[self._probe.state])

    def update(self, result: StepResult) -> list[Request]:
        """Applies the result of a burst. Results of one worker come in the order of its bursts.

        Returns:
            Requests that the result has ended: finished ones, and ones shown to be at fault, which have a
            `failure`.

        Raises:
            EngineDead: every burst fails.
        """
        burst, self.moved = self._bursts.pop(result.burst_id), []
        if self._tails[burst.worker] == result.burst_id:
            del self._tails[burst.worker]
        assert burst.doomed == (result.failure == "skipped"), "what follows a failed burst is skipped"
        if result.failure is not None:
            return self._fail(burst, result)
        finished = self._blame.note_success()
        if burst.is_probe:
            return finished
        self._note_pace(burst, result)
        self._allowances[burst.worker] = regrow(self._allowances[burst.worker], self._budget)
        for place, (canvas, state) in enumerate(zip(burst.canvases, result.states, strict=True)):
            in_next = canvas.last_burst != result.burst_id
            if not in_next:
                canvas.last_burst = None
            canvas.lone_deaths, canvas.lone_memory_failures, canvas.short_on = 0, 0, frozenset()
            if not canvas.goes_on:  # aborted, or ended by the previous burst
                continue
            if state.fault:
                kind, text = FAULTS[state.fault]
                finished.append(self._end(canvas, kind(text.format(state.error))))
                continue
            request = self._requests[canvas.request_id]
            canvas.move(request.settle(canvas, state))
            canvas.home = burst.worker if canvas.state.full_tokens else None
            self.moved.append(canvas)
            if canvas.spec.trace:
                canvas.events.append(result.events.get(place, b""))
            if canvas.state.finished:
                request.num_open -= 1
                if request.num_open == 0:
                    finished.append(self._requests.pop(request.request_id))
            elif not in_next:
                self._ready.push(canvas)
        return finished

    def _note_pace(self, burst: _Burst, result: StepResult) -> None:
        """Records the seconds per step of the worker."""
        pairs = zip(burst.canvases, result.states, strict=True)
        gains = (s.num_forwards - c.state.num_forwards for c, s in pairs if c.goes_on)
        taken = max(gains, default=0)
        if taken > 0:
            num_rows = sum(canvas.num_rows for canvas in burst.canvases)
            forwarded = result.num_rows // taken
            if 0 < 2 * forwarded < num_rows:  # canvases share most rows, and may not in the next steps
                num_rows = forwarded
            self._paces[burst.worker] = Pace(result.seconds / taken, num_rows)

    def take_convicted(self) -> list[Request]:
        """Accused requests that end because no other request is live; they have a `failure`."""
        return self._blame.convict() if not (self._requests or self._is_probing()) else []

    def lose(self, worker: int, *, died: bool = True) -> list[Request]:
        """Requeues the canvases of a worker that is gone, in their state before its bursts.

        Args:
            worker: number of the worker.
            died: the worker has died, so that the burst that it ran, the first one not doomed, is suspected.
                False: it was stopped on purpose.

        Returns:
            Requests that are to blame; they have ended with a `failure`.

        Raises:
            Unavailable: workers die of every burst.
        """
        suspects, were_alone = list[Canvas](), False
        lost = {number: burst for number, burst in self._bursts.items() if burst.worker == worker}
        ran = next((burst for burst in lost.values() if not burst.doomed), None)
        for burst_id, burst in lost.items():
            del self._bursts[burst_id]
            # A burst that follows a failed one no longer owns its canvases; other bursts may have them.
            back = [canvas for canvas in burst.canvases if canvas.last_burst in lost]
            for canvas in back:
                canvas.last_burst = canvas.home = None
            back = [canvas for canvas in back if canvas.goes_on]
            if burst.is_probe:
                self._blame.note_lost_probe(died and burst is ran)
            elif died and burst is ran:
                suspects, were_alone = back, len(burst.canvases) == 1
            else:
                for canvas in back:
                    self._ready.push(canvas)
        self._ready.release(worker)
        self._tails.pop(worker, None)
        self._allowances.pop(worker, None)
        self._paces.pop(worker, None)
        self._blame.check_probes()
        failure = self._blame.note_death(suspects, were_alone)
        return [self._end(suspects[0], failure)] if failure is not None else []

    def _fail(self, burst: _Burst, result: StepResult) -> list[Request]:
        """Requeues the canvases of a burst that has failed; returns the request that is to blame, if any."""
        if burst.is_probe:
            if result.failure == "error":
                raise EngineDead(DEAD.format(result.error))
            self._blame.note_lost_probe(died=False)
            return []
        ended: list[Request] = []
        if not burst.doomed:
            self._doom_followers(result.burst_id)
            (first, *others) = burst.canvases
            if result.failure == "error":
                if not others and first.goes_on:
                    error = result.error or "an error"
                    self._blame.accuse(self._end(first, RequestFailed(RAISED.format(error))), error)
            else:
                self._shrink(burst)
                failure = self._blame.note_misfit(first) if not others and first.goes_on else None
                if failure is not None:
                    ended.append(self._end(first, failure))
                    for worker in first.short_on:  # their memory is as large as it was
                        self._allowances.pop(worker, None)
        # Bursts that follow a failed one will be skipped: their canvases must not come back with others.
        back = [
            canvas
            for canvas in burst.canvases
            if canvas.last_burst == result.burst_id or (not burst.doomed and canvas.last_burst is not None)
        ]
        for canvas in back:
            canvas.last_burst = None
        back = [canvas for canvas in back if canvas.goes_on]
        if burst.doomed:
            for canvas in back:
                self._ready.push(canvas)
        else:
            self._blame.set_apart(back)
        return ended

    def _shrink(self, burst: _Burst) -> None:
        """Reduces the budget of a worker after a burst that did not fit."""
        for canvas in burst.canvases:
            canvas.short_on |= {burst.worker}
        num_rows = sum(canvas.num_rows for canvas in burst.canvases)
        self._allowances[burst.worker] = shrink(
            self._allowances[burst.worker], num_rows=num_rows, num_seqs=len(burst.canvases)
        )

    def _doom_followers(self, failed: int) -> None:
        """Marks the bursts in flight that follow a failed one, directly or indirectly."""
        doomed = {failed}
        for burst_id, burst in self._bursts.items():
            if burst.follows in doomed:
                burst.doomed = True
                doomed.add(burst_id)

    def _end(self, canvas: Canvas, failure: RemaskError) -> Request:
        """Ends the request of a canvas that is not in the queue."""
        request = self._requests[canvas.request_id]
        request.failure = failure
        self.abort([request.request_id])
        return request

    def _take(self, worker: int, budget: Budget, running: list[Canvas], num_idle: int) -> list[Canvas]:
        """The first canvases of the queue and of a worker's burst in flight that fit its budget. Those whose
        keys another worker holds stay with it, unless it is busy and this one would be idle."""
        if num_idle:
            num_ready = len(self._ready) + len(running)
            share = max(1, -(-num_ready // (num_idle + 1)))
            budget = budget._replace(max_num_seqs=min(budget.max_num_seqs, share))
        taken, passed = take(self._ready.candidates([None, worker], running), budget)
        if not taken:
            busy = [home for home in self._ready.homes() if home in self._tails]
            taken, passed = take(self._ready.candidates(busy, running), budget)
        for canvas in passed:
            if canvas.last_burst is None:
                self._ready.push(canvas)
        return taken
