"""The live requests, their canvases, and which burst each canvas is in.

The scheduler owns every canvas; a worker only borrows it for a burst. A canvas is *ready* (it waits in the
queue), *in flight* (it is in a burst, and perhaps in others that continue it), or *ended*. Between bursts
nobody holds a place: each burst takes the first of the queue, so those that run keep running and an urgent
newcomer displaces the last of them at the cost of nothing but their turn.

A burst whose worker died is *suspected*: its canvases run again apart from all others, in two groups, until
the group that kills is a single canvas. Whatever comes back is cleared. So a request that kills workers is
found in a few deaths, and one that was only there costs nothing. (What a policy's kernel raises is no such
case: the worker finds the canvas itself, and runs the others.)

A burst that raises an error is suspected in the same way, and a request that raises alone is *accused*. It
ends when another burst comes back. If several requests in a row are accused of one error, a *probe*, a canvas
of one token, decides whether they are at fault or nothing works any more. A probe also runs after a worker
has died of a single canvas: only if something else lives is that canvas to blame.

A burst that does not fit a worker's memory is suspected, too, and for a while the worker gets smaller bursts.
Only a canvas that does not fit alone, twice, ends its request. Then it was not the worker's memory that was
short, and the worker gets its larger bursts back.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remask.scheduler.canvas import NO_COMMIT, NO_MEMORY, NOT_NUMBERS, RAISES, Canvas
from remask.scheduler.errors import (
    EngineDead,
    RemaskError,
    RequestFailed,
    RequestTooLarge,
    Unavailable,
    WorkerDied,
)
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.planning import (
    BURST_SECONDS,
    Allowance,
    Budget,
    Order,
    Pace,
    burst_len,
    order_of,
    regrow,
    shrink,
    split,
    take,
)
from remask.scheduler.request import Request

MAX_LONE_DEATHS = 3  # a request is to blame after so many, in a row and without progress
MAX_ACCUSED = 8  # requests that fail alone with one error before a probe decides
MAX_PROBE_DEATHS = 8  # in a row: then no worker lives
MAX_LONE_MEMORY_FAILURES = 2  # the second after all memory was freed
DEATHS = "{} workers in a row died while it ran alone"
RAISED = "a step of it raised {}, also while it ran alone; check what is particular about its parameters"
DEAD = "every burst fails with {}; make a new engine"
NO_WORKER_LIVES = "{} workers in a row died of a canvas of one token"
FAULTS: dict[int, tuple[type[RemaskError], str]] = {
    NOT_NUMBERS: (
        RequestFailed,
        "its logits are not numbers; use dtype='bfloat16' or 'float32', or check the checkpoint",
    ),
    NO_COMMIT: (RequestFailed, "a step of it committed nothing although its policy must; check the policy"),
    RAISES: (RequestFailed, "its policy raised {}; check the policy and its parameters"),
    NO_MEMORY: (RequestTooLarge, "its policy takes more memory than there is, for it alone: {}"),
}
TOO_LARGE = (
    "a step of it takes {} rows, which do not fit into the worker's memory even alone; use fewer max_tokens, "
    "a shorter prompt or a policy that needs fewer rows, or a smaller dtype, quantization or a larger GPU"
)


@dataclass
class _Burst:
    """A burst that has not come back; the worker runs its bursts one after another."""

    worker: int
    canvases: list[Canvas]
    num_steps: int
    follows: int | None  # the burst whose canvases it continues
    apart: bool  # its canvases are suspected, or it is a probe: the worker has nothing else
    doomed: bool = False  # what it follows has failed: it will not run
    is_probe: bool = False


class Scheduler:
    """Cuts bursts from a queue of canvases and applies their results.

    Args:
        max_num_rows: rows of a forward where a worker's memory allows it; a canvas that is larger runs alone.
        max_num_seqs: canvases of a burst, likewise.
        burst: denoising steps of a burst; None: see `planning.burst_len`.
        probe: a canvas of one token.
        burst_seconds: how long a burst may last if `burst` is None.

    Attributes:
        moved: the canvases that the last result has taken further, the ended ones included.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_seqs: int,
        burst: int | None,
        probe: Canvas,
        burst_seconds: float = BURST_SECONDS,
    ) -> None:
        self._probe, self._burst_seconds = probe, burst_seconds
        self._budget, self._burst_len = Budget(max_num_rows, max_num_seqs), burst
        self._allowances = defaultdict[int, Allowance](lambda: Allowance(self._budget))  # by worker
        self._requests: dict[str, Request] = {}
        self._queue: list[tuple[Order, Canvas]] = []  # heap; may hold canvases of aborted requests
        self._num_stale = 0  # of them, those of aborted requests
        self._bursts: dict[int, _Burst] = {}  # in the order in which they were cut
        self._tails: dict[int, int] = {}  # worker -> its last burst, while that is in flight
        self._burst_ids = itertools.count()
        self._num_quiet = 0  # bursts since the last arrival
        self._suspects: deque[list[Canvas]] = deque()  # groups that run each in a burst of its own
        self._num_survived = 0  # bursts that came back
        self._accused: list[Request] = []  # since a burst came back
        self._accused_of: list[str] = []  # the class of error of the last of them, for each in a row
        self._wants_probe, self._probe_deaths = False, 0
        self._paces: dict[int, Pace] = {}  # by worker
        self.moved: list[Canvas] = []

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests) + len(self._accused)

    @property
    def num_held(self) -> int:
        """Canvases that the queue and the bursts in flight refer to, those of aborted requests included."""
        in_bursts = sum(len(burst.canvases) for burst in self._bursts.values())
        return len(self._queue) + in_bursts + sum(map(len, self._suspects))

    def add(self, request: Request) -> None:
        """Takes a request; its canvases may join the next burst."""
        self._requests[request.request_id] = request
        self._num_quiet = 0
        for canvas in request.canvases:
            canvas.order = order_of(request.priority, request.arrival_time, canvas.ordinal)
            heapq.heappush(self._queue, (canvas.order, canvas))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests in whatever state; what a burst in flight still does to them is dropped.

        Ids that are not live are passed over: a request may end just before it is aborted.
        """
        request_ids = set(request_ids)
        self._accused = [request for request in self._accused if request.request_id not in request_ids]
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            for canvas in request.canvases if request is not None else ():
                canvas.aborted = True
                in_queue = canvas.last_burst is None and not canvas.suspected
                self._num_stale += in_queue and not canvas.state.finished
        if 2 * self._num_stale > len(self._queue):  # so that a removal costs a constant number of moves
            self._queue = [entry for entry in self._queue if not entry[1].aborted]
            heapq.heapify(self._queue)
            self._num_stale = 0

    def next_batch(self, worker: int = 0, *, num_idle: int = 0) -> StepBatch | None:
        """The next burst for a worker, or None when there is nothing for it.

        While a burst of the worker is in flight, the new one may *continue* its canvases: it names their
        places there, and the worker goes on with what that burst leaves behind.

        Args:
            worker: whom it is for.
            num_idle: other workers that have nothing to do; canvases are left for them.
        """
        follows, before = self._tails.get(worker), list[Canvas]()
        if follows is not None:
            tail = self._bursts[follows]
            if self._suspects or tail.apart:
                return None  # a worker that dies may take the result of the burst before with it
            if tail.doomed:
                return None  # what follows it would not run either
            before = tail.canvases
        if self._wants_probe and follows is None:
            return self._cut_probe(worker)
        suspects = self._next_suspects(worker) if not self._is_probing() else []
        taken = suspects or self._take(worker, before, num_idle)
        if not taken:
            return None
        places = {id(canvas): place for place, canvas in enumerate(before)}
        continued = sum(id(canvas) in places for canvas in taken)
        others_wait = self._first_ready() is not None or continued < sum(map(_goes_on, before))
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
        """Whether it is open if anything else lives; until then suspects wait."""
        return self._wants_probe or any(burst.is_probe for burst in self._bursts.values())

    def _cut_probe(self, worker: int) -> StepBatch:
        """A burst of the probe alone."""
        burst_id = self._tails[worker] = next(self._burst_ids)
        self._bursts[burst_id] = _Burst(worker, [], 1, None, apart=True, is_probe=True)
        self._wants_probe = False
        return StepBatch(burst_id=burst_id, num_steps=1, specs=[self._probe.spec], states=[self._probe.state])

    def update(self, result: StepResult) -> list[Request]:
        """Applies a burst's result.

        Results of one worker come in the order of its bursts.

        Returns:
            Requests that have ended by it: those that it finished, and those that it has shown to be at
            fault, which have a `failure`.

        Raises:
            EngineDead: every burst fails.
        """
        burst, self.moved = self._bursts.pop(result.burst_id), []
        if self._tails[burst.worker] == result.burst_id:
            del self._tails[burst.worker]
        assert burst.doomed == (result.failure == "skipped"), "what follows a failed burst is skipped"
        if result.failure is not None:
            return self._fail(burst, result)
        self._num_survived += 1
        self._probe_deaths = 0
        finished = self._convict()
        if burst.is_probe:
            return finished
        self._note_pace(burst, result)
        self._allowances[burst.worker] = regrow(self._allowances[burst.worker], self._budget)
        for place, (canvas, state) in enumerate(zip(burst.canvases, result.states, strict=True)):
            in_next = canvas.last_burst != result.burst_id
            if not in_next:
                canvas.last_burst = None
            canvas.lone_deaths, canvas.lone_memory_failures, canvas.short_on = 0, 0, frozenset()
            if not _goes_on(canvas):  # aborted, or ended by the burst before
                continue
            if state.fault:
                kind, text = FAULTS[state.fault]
                finished.append(self._end(canvas, kind(text.format(state.error))))
                continue
            request = self._requests[canvas.request_id]
            canvas.state = request.settle(canvas, state)
            self.moved.append(canvas)
            if canvas.spec.trace:
                canvas.events.append(result.events.get(place, b""))
            if canvas.state.finished:
                request.num_open -= 1
                if request.num_open == 0:
                    finished.append(self._requests.pop(request.request_id))
            elif not in_next:
                heapq.heappush(self._queue, (canvas.order, canvas))
        return finished

    def _note_pace(self, burst: _Burst, result: StepResult) -> None:
        """Notes how fast the worker was, by the steps that were taken."""
        pairs = zip(burst.canvases, result.states, strict=True)
        gains = (s.num_forwards - c.state.num_forwards for c, s in pairs if _goes_on(c))
        taken = max(gains, default=0)
        if taken > 0:
            num_rows = sum(canvas.num_rows for canvas in burst.canvases)
            self._paces[burst.worker] = Pace(result.seconds / taken, num_rows)

    def take_convicted(self) -> list[Request]:
        """Accused requests that end because nothing else is live; they have a `failure`."""
        return self._convict() if not (self._requests or self._is_probing()) else []

    def lose(self, worker: int, *, died: bool = True) -> list[Request]:
        """Takes back what a worker had: its canvases are ready again as they were before.

        Args:
            worker: who does not bring its bursts back.
            died: it died of itself: the burst that it ran, the first of its queue that could, is suspected.

        Returns:
            Requests that are to blame for it; they have ended with a `failure`.

        Raises:
            Unavailable: workers die of whatever they run.
        """
        suspects, were_alone = list[Canvas](), False
        lost = {number: burst for number, burst in self._bursts.items() if burst.worker == worker}
        ran = next((burst for burst in lost.values() if not burst.doomed), None)
        for burst_id, burst in lost.items():
            del self._bursts[burst_id]
            # What follows a failed burst has lost its canvases already; others may have them.
            back = [canvas for canvas in burst.canvases if canvas.last_burst in lost]
            for canvas in back:
                canvas.last_burst = None
            back = list(filter(_goes_on, back))
            if burst.is_probe:
                self._wants_probe = True
                self._probe_deaths += died and burst is ran
            elif died and burst is ran:
                suspects, were_alone = back, len(burst.canvases) == 1
            else:
                for canvas in back:
                    heapq.heappush(self._queue, (canvas.order, canvas))
        self._tails.pop(worker, None)
        self._allowances.pop(worker, None)
        self._paces.pop(worker, None)
        if self._probe_deaths >= MAX_PROBE_DEATHS:
            raise Unavailable(NO_WORKER_LIVES.format(self._probe_deaths))
        return self._suspect(suspects, were_alone)

    def _fail(self, burst: _Burst, result: StepResult) -> list[Request]:
        """Takes back what a worker could not run; returns the request that does not fit alone, if any."""
        if burst.is_probe:
            if result.failure == "error":
                raise EngineDead(DEAD.format(result.error))
            self._wants_probe = True
            return []
        ended: list[Request] = []
        if not burst.doomed:
            self._doom_followers(result.burst_id)
            (first, *others) = burst.canvases
            if result.failure == "error":
                if not others and _goes_on(first):
                    self._accuse(first, result.error or "an error")
            else:
                self._shrink(burst)
                if not others and _goes_on(first):
                    first.lone_memory_failures += 1
                    if first.lone_memory_failures >= MAX_LONE_MEMORY_FAILURES:
                        ended.append(self._end(first, RequestTooLarge(TOO_LARGE.format(first.num_rows))))
                        for worker in first.short_on:  # their memory is as large as it was
                            self._allowances.pop(worker, None)
        # What follows a failure will not run either: its canvases must not come back with others.
        back = [
            canvas
            for canvas in burst.canvases
            if canvas.last_burst == result.burst_id or (not burst.doomed and canvas.last_burst is not None)
        ]
        for canvas in back:
            canvas.last_burst = None
        back = list(filter(_goes_on, back))
        if burst.doomed:
            for canvas in back:
                heapq.heappush(self._queue, (canvas.order, canvas))
        else:
            self._set_apart(back)
        return ended

    def _shrink(self, burst: _Burst) -> None:
        """Lets a worker have less than a burst that did not fit."""
        for canvas in burst.canvases:
            canvas.short_on |= {burst.worker}
        num_rows = sum(canvas.num_rows for canvas in burst.canvases)
        self._allowances[burst.worker] = shrink(
            self._allowances[burst.worker], num_rows=num_rows, num_seqs=len(burst.canvases)
        )

    def _doom_followers(self, failed: int) -> None:
        """Marks the bursts in flight that go on from a failed one, directly or not."""
        doomed = {failed}
        for burst_id, burst in self._bursts.items():
            if burst.follows in doomed:
                burst.doomed = True
                doomed.add(burst_id)

    def _suspect(self, canvases: list[Canvas], were_alone: bool) -> list[Request]:
        """Sets canvases apart whose burst died; returns the request that is to blame, if one is."""
        self._set_apart(canvases)
        if were_alone and canvases:
            (canvas,) = canvases
            # A death counts where something else has lived since the one before: else it may be the machine.
            if not canvas.lone_deaths or self._num_survived > canvas.survived:
                canvas.lone_deaths += 1
                canvas.survived = self._num_survived
            if canvas.lone_deaths >= MAX_LONE_DEATHS:
                self._suspects.popleft()
                return [self._end(canvas, WorkerDied(DEATHS.format(canvas.lone_deaths)))]
            self._wants_probe = True
        return []

    def _accuse(self, canvas: Canvas, error: str) -> None:
        """Notes that a request has raised an error while it ran alone."""
        request = self._end(canvas, RequestFailed(RAISED.format(error)))
        kind = error.partition(":")[0]
        self._accused.append(request)
        self._accused_of = [*self._accused_of, kind] if self._accused_of[-1:] == [kind] else [kind]
        self._wants_probe |= len(self._accused_of) >= MAX_ACCUSED

    def _convict(self) -> list[Request]:
        """Ends what is accused: it has raised alone, and something else has not."""
        convicted, self._accused, self._accused_of = self._accused, [], []
        self._wants_probe = False
        return convicted

    def _set_apart(self, canvases: list[Canvas]) -> None:
        """Lets canvases run apart from all others, in two groups, before those that wait for it already."""
        for canvas in canvases:
            canvas.suspected = True
        self._suspects.extendleft(filter(None, reversed(split(canvases))))

    def _end(self, canvas: Canvas, failure: RemaskError) -> Request:
        """Ends the request of a canvas, which is not in the queue."""
        request = self._requests[canvas.request_id]
        request.failure = failure
        self.abort([request.request_id])
        return request

    def _next_suspects(self, worker: int) -> list[Canvas]:
        """The next group that must run apart, or what of it a worker may have; empty where there is none."""
        while self._suspects:
            group = filter(_goes_on, self._suspects.popleft())
            taken, passed = take(group, self._allowances[worker].budget)
            if left := [*passed, *group]:
                self._suspects.appendleft(left)
            for canvas in taken:
                canvas.suspected = False
            if taken:
                return taken
        return []

    def _take(self, worker: int, before: list[Canvas], num_idle: int) -> list[Canvas]:
        """The first of the queue, and of a worker's burst in flight, that fit what it may have."""
        budget = self._allowances[worker].budget
        if num_idle:
            num_ready = len(self._queue) - self._num_stale + sum(map(_goes_on, before))
            share = max(1, -(-num_ready // (num_idle + 1)))
            budget = Budget(budget.max_num_rows, min(budget.max_num_seqs, share))
        taken, passed = take(self._candidates(before), budget)
        for canvas in passed:
            if canvas.last_burst is None:
                heapq.heappush(self._queue, (canvas.order, canvas))
        return taken

    def _first_ready(self) -> Canvas | None:
        """The first of the queue that is live; those of aborted requests before it are dropped."""
        while self._queue:
            canvas = self._queue[0][1]
            if not canvas.aborted:
                return canvas
            heapq.heappop(self._queue)
            self._num_stale -= 1
        return None

    def _candidates(self, before: list[Canvas]) -> Iterator[Canvas]:
        """Who may join a worker's next burst, in order: the queue, whose canvases leave it, and those of its
        burst in flight."""
        running = filter(_goes_on, before)  # a burst is in the order of the queue
        first_running = next(running, None)
        while True:
            ready = self._first_ready()
            if ready is None and first_running is None:
                return
            if ready is None or (first_running is not None and first_running.order < ready.order):
                assert first_running is not None
                yield first_running
                first_running = next(running, None)
            else:
                yield heapq.heappop(self._queue)[1]


def _goes_on(canvas: Canvas) -> bool:
    return not (canvas.aborted or canvas.state.finished)
