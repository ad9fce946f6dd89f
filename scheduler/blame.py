"""Finds the canvases that are to blame for bursts that failed.

The canvases of a failed burst are *suspected*: they run again apart from all others, in two groups, which are
split again until a group that fails is a single canvas. A group that comes back is cleared. So a few failures
find the canvas at fault, and its neighbours lose only time. (An exception of a policy's kernel does not fail
the burst: the worker itself finds the canvas and runs the others.)

A request that raises an error alone is *accused*. It ends when another burst comes back. If several requests
in a row are accused of one error, a *probe*, a canvas of one token, decides whether they are at fault or
every burst fails. A probe also runs after a worker has died of a single canvas, which is to blame only if
another burst comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from remask.scheduler.canvas import NO_COMMIT, NO_MEMORY, NOT_NUMBERS, RAISES, Canvas, new_canvas
from remask.scheduler.errors import RemaskError, RequestFailed, RequestTooLarge, Unavailable, WorkerDied
from remask.scheduler.params import resolve
from remask.scheduler.planning import Budget, split, take
from remask.scheduler.request import Request

MAX_LONE_DEATHS = 3  # consecutive deaths of workers with a single canvas before its request is to blame
MAX_ACCUSED = 8  # consecutive requests accused of one error before a probe decides
MAX_PROBE_DEATHS = 8  # consecutive deaths of workers with a probe before the engine gives up
MAX_LONE_MEMORY_FAILURES = 2  # the worker frees all memory after the first
DEATHS = "{} workers in a row died while it ran alone"
RAISED = "a step of it raised {}, also while it ran alone; check its parameters"
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


class Blame:
    """The suspected canvases and the accused requests.

    Attributes:
        wants_probe: a probe must run before any suspect does.
    """

    def __init__(self) -> None:
        self.wants_probe = False
        self._probe_deaths = 0  # in a row
        self._groups: deque[list[Canvas]] = deque()  # each runs in a burst of its own
        self._num_survived = 0  # bursts that came back
        self._accused: list[Request] = []  # since a burst came back
        self._accused_of: list[str] = []  # the class of error of the last of them, for each in a row

    @property
    def has_suspects(self) -> bool:
        return bool(self._groups)

    @property
    def num_suspects(self) -> int:
        """Suspected canvases, those of aborted requests included."""
        return sum(map(len, self._groups))

    @property
    def num_accused(self) -> int:
        return len(self._accused)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drops accused requests."""
        self._accused = [request for request in self._accused if request.request_id not in request_ids]

    def set_apart(self, canvases: list[Canvas]) -> None:
        """Suspects canvases: two groups of them run apart from all others, before the groups that wait."""
        for canvas in canvases:
            canvas.suspected = True
        self._groups.extendleft(filter(None, reversed(split(canvases))))

    def next_group(self, budget: Budget) -> list[Canvas]:
        """The next group to run apart, or the part of it that fits a budget; empty if there is none."""
        while self._groups:
            group = (canvas for canvas in self._groups.popleft() if canvas.goes_on)
            taken, passed = take(group, budget)
            if left := [*passed, *group]:
                self._groups.appendleft(left)
            for canvas in taken:
                canvas.suspected = False
            if taken:
                return taken
        return []

    def note_death(self, canvases: list[Canvas], were_alone: bool) -> RemaskError | None:
        """Suspects the canvases of a burst whose worker died.

        Args:
            canvases: the live canvases of the burst.
            were_alone: whether the burst had one canvas.

        Returns:
            The failure of that canvas if it is to blame, else None.
        """
        self.set_apart(canvases)
        if not (were_alone and canvases):
            return None
        (canvas,) = canvases
        # A death counts if a burst has come back since the last one: otherwise the machine may be at fault.
        if not canvas.lone_deaths or self._num_survived > canvas.survived:
            canvas.lone_deaths += 1
            canvas.survived = self._num_survived
        if canvas.lone_deaths >= MAX_LONE_DEATHS:
            self._groups.popleft()
            return WorkerDied(DEATHS.format(canvas.lone_deaths))
        self.wants_probe = True
        return None

    def note_misfit(self, canvas: Canvas) -> RemaskError | None:
        """Records that a canvas did not fit a worker's memory alone; returns its failure the second time."""
        canvas.lone_memory_failures += 1
        if canvas.lone_memory_failures < MAX_LONE_MEMORY_FAILURES:
            return None
        return RequestTooLarge(TOO_LARGE.format(canvas.num_rows))

    def accuse(self, request: Request, error: str) -> None:
        """Records that a request, which has ended with a `failure`, raised an error while it ran alone."""
        kind = error.partition(":")[0]
        self._accused.append(request)
        self._accused_of = [*self._accused_of, kind] if self._accused_of[-1:] == [kind] else [kind]
        self.wants_probe |= len(self._accused_of) >= MAX_ACCUSED

    def note_success(self) -> list[Request]:
        """Records that a burst has come back; returns the requests that are convicted by it."""
        self._num_survived += 1
        self._probe_deaths = 0
        return self.convict()

    def convict(self) -> list[Request]:
        """Returns the accused requests, which are at fault, and clears the list."""
        convicted, self._accused, self._accused_of = self._accused, [], []
        self.wants_probe = False
        return convicted

    def note_lost_probe(self, died: bool) -> None:
        """Records that a probe has not come back, and whether its worker died."""
        self.wants_probe = True
        self._probe_deaths += died

    def check_probes(self) -> None:
        """Raises Unavailable if too many workers in a row died of a probe."""
        if self._probe_deaths >= MAX_PROBE_DEATHS:
            raise Unavailable(NO_WORKER_LIVES.format(self._probe_deaths))


def new_probe(mask_id: int, shift: int = 0) -> Canvas:
    """A canvas of one token behind a prompt of one."""
    params = resolve({"max_tokens": 1})
    prompt = [0 if mask_id != 0 else 1]
    return new_canvas(
        "probe", 0, prompt, params, seed=2**62, sample=0, mask_id=mask_id, stop_ids=[], shift=shift
    )
