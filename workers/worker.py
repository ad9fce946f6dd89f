"""A worker: weights, and the canvases of its last burst in case the next burst continues them.

The canvases are a cache: the scheduler has them too, so any worker can run a burst that continues nothing. A
burst is *launched*, which returns before a GPU has run it, and *collected*. The next burst can be launched
while the host reads the results of the previous one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import torch

from remask.scheduler.canvas import CanvasSpec, CanvasState
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.burst.carry import put, take
from remask.workers.burst.enqueue import StepQueue
from remask.workers.burst.graphs import Shape, StepGraphs
from remask.workers.burst.keys import BurstKeys
from remask.workers.burst.staging import Fetched, to_device
from remask.workers.burst.state import BurstState
from remask.workers.burst.wire import Results
from remask.workers.failures import describe, is_out_of_memory, loses_device
from remask.workers.key_store import KeysDoNotFit, KeyStore
from remask.workers.models.denoiser import Denoiser, TransformerDenoiser
from remask.workers.models.transformer import Transformer
from remask.workers.models.update import Weights, read_weights, replace_weights
from remask.workers.rows.kept import DISCARDED, NOTHING_KEPT
from remask.workers.startup.device import on_device
from remask.workers.steps import BurstPlans, advance, plan_burst, plan_first, steps_of

logger = logging.getLogger(__name__)

MAX_KEY_ROWS = 1 << 14


class NotRun(NamedTuple):
    """A burst that did not run, and why; see `StepResult`."""

    burst_id: int
    failure: Literal["memory", "error", "skipped"]
    seconds: float
    error: str | None = None


class Unpacked(NamedTuple):
    """The canvases of a burst where the model is.

    Attributes:
        plans: of the steps; None without static shapes.
        shape: that of the memory which they stand in, where a graph can use it.
        origin: the canvases as the host knew them when the tensors were made.
    """

    state: BurstState
    plans: BurstPlans | None
    shape: Shape | None
    origin: list[CanvasState]


@dataclass
class Launched:
    """A burst that runs, or has run.

    Attributes:
        burst_id: its number.
        started: monotonic seconds.
        num_canvases: how many of the state's canvases are the burst's; the others pad it.
        state: the canvases.
        steps: its steps.
        results: what the burst leaves behind, once all its steps are enqueued.
        error: what ended it before that.
        states: the canvases as the scheduler gets them, once they have been waited for.
        events: what happened to those that are traced, by their places.
        keys: its kept rows; None: none of its canvases reuses keys.
        ended: monotonic seconds; 0: not known yet.
    """

    burst_id: int
    started: float
    num_canvases: int
    state: BurstState
    steps: StepQueue
    keys: BurstKeys | None = None
    results: Fetched[Results] | None = None
    error: BaseException | None = None
    states: list[CanvasState] | None = None
    events: dict[int, bytes] = field(default_factory=dict)
    ended: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @torch.inference_mode()
    def enqueue_rest(self) -> None:
        """Enqueues the steps that are left and the copy of the results; from any thread. A failure is kept as
        `error`."""
        with self.lock:
            if self.results is not None or self.error is not None:
                return
            try:
                self.steps.enqueue_rest()
                self.results = Fetched(self.state.results())
            except BaseException as error:
                self.error = error
                if is_out_of_memory(error):
                    error.__traceback__ = None  # it holds the tensors of the step that did not fit
                if not isinstance(error, Exception):
                    raise

    def wait(self) -> list[CanvasState]:
        """The canvases, when the burst is over; from any thread, also while the next burst is launched."""
        with self.lock:
            self.enqueue_rest()
            if self.error is not None:
                raise self.error
            if self.states is None:
                assert self.results is not None, "all steps are enqueued"
                results = self.results.wait()
                self.states = self.state.to_states(results)[: self.num_canvases]
                self.events = self.state.events.pack(results.events)
                if self.keys is not None:
                    self.keys.end(self.states)
                self.ended = time.perf_counter()
            return self.states


class Worker:
    """Runs bursts on one model, one after another.

    Args:
        model: the weights.
        graphs: of its steps; None: every step is launched kernel by kernel.
        packs: whether canvases share forwards. Products of other shapes round differently; alone, a canvas
            has the same shapes in any company.
        max_key_rows: maximum rows whose keys and values are kept.
    """

    def __init__(
        self,
        model: Denoiser,
        graphs: StepGraphs | None = None,
        *,
        packs: bool = True,
        max_key_rows: int = MAX_KEY_ROWS,
    ) -> None:
        self._model, self._graphs = model, graphs
        self._store, self._num_key_rows = KeyStore(DISCARDED + 1, max_key_rows), DISCARDED + 1 + max_key_rows
        self._pack_rows = model.pack_rows if packs else 1
        self._last: Launched | None = None
        self._tensors: Unpacked | None = None  # what it left where the model is
        self._failed: int | None = None  # the last burst, where it did not run
        self._free_since = 0.0  # when the last burst that was collected had ended
        self._staged: Transformer | None = None  # new weights

    @property
    def model(self) -> Denoiser:
        return self._model

    @property
    def overlaps(self) -> bool:
        """Whether launching a burst returns before it has run."""
        return self._model.device.type == "cuda"

    def run(self, batch: StepBatch) -> StepResult:
        """Takes up to `batch.num_steps` denoising steps; a pure function of the canvases and the weights.

        A burst that was interrupted may be run again. One that does not fit the memory or raises an error, or
        follows such a one, changes nothing and is answered as failed. An error that loses the GPU is raised.
        """
        return self.collect(self.launch(batch))

    def launch(self, batch: StepBatch) -> Launched | NotRun:
        """Starts a burst. It may follow the one that was launched before it, collected or not."""
        with on_device(self._model.device):
            return self._try_launch(batch)

    def _try_launch(self, batch: StepBatch) -> Launched | NotRun:
        if self._last is not None:
            self._last.enqueue_rest()
            if self._last.error is not None:
                self._fail(self._last.burst_id, is_out_of_memory(self._last.error))
        if batch.follows is not None and batch.follows == self._failed:
            self._failed = batch.burst_id
            return NotRun(batch.burst_id, "skipped", 0.0)
        self._failed = None
        started = time.perf_counter()
        try:
            return self._launch(batch)
        except Exception as error:
            failed = not_run(batch.burst_id, error, time.perf_counter() - started)
        # Only now does nothing hold the tensors of the failed step any more.
        self._fail(batch.burst_id, failed.failure == "memory")
        return failed

    def collect(self, launched: Launched | NotRun) -> StepResult:
        """Waits for a burst; from any thread, while others are launched from one."""
        if not isinstance(launched, NotRun):
            try:
                with on_device(self._model.device):
                    states = launched.wait()
            except Exception as error:
                launched = not_run(launched.burst_id, error, time.perf_counter() - launched.started)
            else:
                # Until the burst before it had ended it waited for the device.
                started = max(launched.started, self._free_since)
                self._free_since = launched.ended
                return StepResult(
                    burst_id=launched.burst_id,
                    states=states,
                    num_rows=launched.steps.num_rows,
                    seconds=launched.ended - started,
                    events=launched.events,
                )
        burst_id, failure, seconds, message = launched
        return StepResult(
            burst_id=burst_id, states=[], num_rows=0, seconds=seconds, failure=failure, error=message
        )

    def stage(self, weights: Weights) -> None:
        """Reads and checks new weights in host memory; from any thread, while bursts run.

        Raises:
            InvalidRequest: see `read_weights`; or the model has no weights to replace.
        """
        model = self._model
        if not isinstance(model, TransformerDenoiser):
            raise InvalidRequest("weights", weights, "cannot be replaced: the model is no transformer")
        self._staged = read_weights(weights, model.config, model.model.embedding.dtype)

    def discard(self) -> None:
        """Drops weights that were staged."""
        self._staged = None

    def swap(self) -> None:
        """Puts staged weights in the place of the model's. No burst is in flight, and none will continue one
        from before."""
        staged, self._staged = self._staged, None
        assert staged is not None, "weights are staged"
        assert isinstance(self._model, TransformerDenoiser), "it has weights"
        with on_device(self._model.device):
            self._last = self._tensors = None
            self._store.clear()
            self._free_keys()
            replace_weights(self._model.model, staged)

    def _fail(self, burst_id: int, frees: bool) -> None:
        """Notes a burst that has failed; if it did not fit, frees all memory but the weights."""
        self._last = self._tensors = None
        self._failed = burst_id
        self._store.end(burst_id)
        if frees:
            self._store.clear()
        self._free_keys()
        if frees and self._graphs is not None:
            self._graphs.clear()
        if frees and self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _free_keys(self) -> None:
        """Frees the memory of kept keys if the store is empty. With static shapes it stays where it is, for
        graphs."""
        if self._model.key_row_bytes and not self._model.static_shapes and self._store.is_empty:
            self._model.keep_rows(0)

    @torch.inference_mode()
    def _launch(self, batch: StepBatch) -> Launched:
        started, last, tensors = time.perf_counter(), self._last, self._tensors
        keys, batch = self._keep_keys(batch)
        unpacked = self._unpack(batch, keys)
        # A burst whose canvases have all ended takes no step.
        pauses = any(spec.pause_at_blocks for spec in batch.specs)
        is_over = unpacked is tensors and last is not None and last.steps.all_paused and not pauses
        steps = self._steps(unpacked, 0 if is_over else batch.num_steps, keys)
        launched = Launched(batch.burst_id, started, len(batch.specs), unpacked.state, steps, keys)
        steps.enqueue_first()
        if self._model.device.type == "cpu":
            launched.wait()  # the next burst writes into the same tensors
            self._free_keys()
        self._last, self._tensors = launched, unpacked
        return launched

    def _keep_keys(self, batch: StepBatch) -> tuple[BurstKeys | None, StepBatch]:
        """The kept rows of the burst, None if no canvas reuses keys and the store is empty; and the burst.
        With static shapes such canvases continue no other burst, because the host must know which of their
        forwards are full."""
        states: dict[int, CanvasState] = {}
        for place, (spec, state) in enumerate(zip(batch.specs, batch.states, strict=True)):
            if spec.reuse is not None and isinstance(state, int):
                assert self._last is not None, "there is a burst to follow"
                states[place] = self._last.wait()[state]
            elif spec.reuse is not None and not isinstance(state, int):
                states[place] = state
        if not states and self._store.is_empty:
            return None, batch
        if self._store.is_empty:
            self._model.keep_rows(self._num_key_rows)
        if self._model.static_shapes:
            known = [states.get(place, state) for place, state in enumerate(batch.states)]
            batch = msgspec.structs.replace(batch, states=known)
        try:
            return BurstKeys(self._store, batch.burst_id, batch.specs, states), batch
        except KeysDoNotFit:
            if self._last is None or self._last.states is not None:
                raise
        self._last.wait()  # then its rows can be given to others
        return BurstKeys(self._store, batch.burst_id, batch.specs, states), batch

    def _steps(self, unpacked: Unpacked, num_steps: int, keys: BurstKeys | None) -> StepQueue:
        """The steps of a burst."""
        state, plans, shape, _ = unpacked
        if plans is None:  # the host reads the canvases between steps
            return StepQueue(
                lambda: advance(state, num_steps, self._model, self._pack_rows, keys), 1, state.paused
            )

        def run(step: Callable[[], int]) -> int:
            if shape is None or self._graphs is None:
                return step()
            return self._graphs.step(shape, step)

        return StepQueue(steps_of(state, plans, self._model, run), num_steps, state.paused)

    def _unpack(self, batch: StepBatch, keys: BurstKeys | None) -> Unpacked:
        """The canvases of a burst on the model's device, and with static shapes their plans."""
        fixed = self._model.static_shapes
        # Taken out for as long as they are written to: an interrupted burst starts again from the bytes.
        tensors, self._tensors = self._tensors, None
        before: list[CanvasState] = []
        if batch.follows is not None:
            last = self._last
            assert last is not None, "there is no burst to follow"
            assert last.burst_id == batch.follows, f"burst {batch.follows} is not the last one here"
            # With static shapes, the number of removed tokens is read from the bytes, and grows.
            may_go_on = tensors is not None and not (fixed and tensors.state.removed is not None)
            if tensors is not None and may_go_on and batch.states == list(range(last.num_canvases)):
                tensors.state.resume()
                return tensors
            batch = _with_known_specs(batch, last.state.specs)
            places = {n: state for n, state in enumerate(batch.states) if isinstance(state, int)}
            if fixed and tensors is not None and may_go_on and places:
                carried = take(tensors.state, list(places.values()))
                unpacked = self._place(batch, tensors.origin, keys)
                put(carried, unpacked.state, list(places))
                return unpacked
            before = last.wait()
        return self._place(batch, before, keys)

    def _place(self, batch: StepBatch, before: list[CanvasState], keys: BurstKeys | None) -> Unpacked:
        """A burst's canvases in tensors of their own; `before` are those of the burst that it follows."""
        states = [before[state] if isinstance(state, int) else state for state in batch.states]
        kept = NOTHING_KEPT
        if keys is not None:
            kept = keys.later_rows([own.block for own in states], [own.num_block_forwards for own in states])
        if self._graphs is not None and (placed := self._graphs.place(batch.specs, states, kept)) is not None:
            first = plan_first(placed.host, self._model, self._pack_rows, keys)
            plans = BurstPlans(*to_device(first, self._model.device), placed.plans)
            return Unpacked(placed.state, plans, placed.shape, states)
        state = BurstState(batch.specs, states)
        if not self._model.static_shapes:
            return Unpacked(state, None, None, states)
        state.reserve_removed(batch.num_steps)
        tree = to_device((state, plan_burst(state, self._model, self._pack_rows, keys)), self._model.device)
        return Unpacked(*tree, None, states)


def _with_known_specs(batch: StepBatch, before: Sequence[CanvasSpec]) -> StepBatch:
    """The burst with the worker's own specs of continued canvases. They keep what is derived from them, while
    the specs of a message are new objects."""
    specs = [
        before[state] if isinstance(state, int) else spec
        for spec, state in zip(batch.specs, batch.states, strict=True)
    ]
    return msgspec.structs.replace(batch, specs=specs)


def not_run(burst_id: int, error: Exception, seconds: float) -> NotRun:
    """What a worker says of a burst that raised an error; raises one that loses the GPU."""
    if is_out_of_memory(error):
        error.__traceback__ = None  # it holds the tensors of the step that did not fit
        return NotRun(burst_id, "memory", seconds)
    if loses_device(error):
        raise error
    logger.warning("a burst has failed", exc_info=error)
    return NotRun(burst_id, "error", seconds, describe(error))
