"""`Engine`: takes requests, sends bursts to workers and reports progress. `LLM`, `AsyncLLM` and batch files
use it.

A step schedules bursts, waits for one to come back and applies its result. An engine has no thread of its own
(`EngineThread` has one). It knows neither tensors nor the requests that a caller waits for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from remask.checkpoint import read_intake
from remask.embedded import model_directory
from remask.intake import Prompt
from remask.limits import Admission
from remask.options import EngineOptions
from remask.outputs import (
    CompletionOutput,
    Decode,
    RequestOutput,
    Trace,
    completion,
    request_output,
    trace_of,
)
from remask.scheduler.blame import new_probe
from remask.scheduler.canvas import Canvas
from remask.scheduler.errors import EngineDead, RemaskError
from remask.scheduler.messages import StepResult
from remask.scheduler.params import SamplingParams
from remask.scheduler.planning import BURST_SECONDS, OVERLAPPED_BURST_SECONDS
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler
from remask.workers.executors.base import Event, Executor, Finished, Joined
from remask.workers.executors.in_process import InProcessExecutor
from remask.workers.startup.setup import WorkerSetup

LISTEN_SECONDS = 0.02  # maximum wait for workers on Ray, so that new requests soon reach idle workers


class Progress:
    """The progress of one sample of a request in a step.

    Attributes:
        request_id: id of the request.
        state: the sample's canvas after the burst.
        records: EVENT records of the burst; empty if the request is not traced.
        has_ended: the request has ended, with all its samples.
    """

    def __init__(
        self, canvas: Canvas, records: bytes, request: Request, has_ended: bool, decode: Decode | None
    ) -> None:
        self.request_id, self.state, self.has_ended = canvas.request_id, canvas.state, has_ended
        self.records = records
        self._canvas, self._request, self._decode = canvas, request, decode

    @property
    def arrival_time(self) -> float:
        """Monotonic seconds when the engine accepted the request."""
        return self._request.arrival_time

    @property
    def sample(self) -> int:
        """Index of the sample, below `n`."""
        return self._canvas.spec.sample

    @property
    def num_stable_tokens(self) -> int:
        """Number of tokens in finished blocks, which can no longer change."""
        spec = self._canvas.spec
        return min(self.state.block * spec.block_length, spec.canvas_len)

    @cached_property
    def events(self) -> Trace | None:
        """The commits and remaskings of the burst; None if the request is not traced."""
        return trace_of(self._canvas.spec, self.records) if self._canvas.spec.trace else None

    @cached_property
    def completion(self) -> CompletionOutput | None:
        """The sample if it has ended, else None; built like `output`."""
        return completion(self._canvas, self._request, self._decode) if self.state.finished else None

    @cached_property
    def output(self) -> RequestOutput | None:
        """The output of the request if it has ended, else None. It is built on first access, in any thread,
        so that no step waits for the decoding of text."""
        return request_output(self._request, self._decode) if self.has_ended else None


class Engine:
    """A model, its workers and their queue.

    All methods are called from one thread, except those of `intake` and `admission`.

    Args:
        options: validated options.
        executor: workers that have started; None: the engine starts them.

    Attributes:
        tokenizer: the model's tokenizer; None: there is none.
        executor: the workers.
        intake: validates prompts and parameters and makes requests.
        admission: counts live requests.
        result: the burst whose result the last step applied; None if it applied none.
        weights_version: how many times `swap_weights` has replaced the weights.

    Raises:
        InvalidRequest: an option or a file of the checkpoint is invalid; the error names it.
        Unavailable: Ray cannot be started, or workers die or do not start in time.
    """

    def __init__(self, options: EngineOptions, executor: Executor | None = None) -> None:
        with model_directory(options.model) as directory:
            # Before weights are read, so that errors of the small files and the options come at once.
            self.intake = read_intake(options, directory)
            self.executor = executor or start_executor(options, directory)
        self.intake.max_key_rows = self.executor.facts.max_key_rows
        self.tokenizer, config = self.intake.tokenizer, self.intake.config
        self.admission = Admission(options)
        self._scheduler = Scheduler(
            max_num_rows=self.executor.max_num_rows,
            max_num_seqs=options.max_num_seqs,
            burst=options.burst,
            probe=new_probe(config.mask_id, config.shift),
            max_key_rows=self.executor.facts.max_key_rows,
            continues_reuse=not self.executor.facts.overlaps,
            burst_seconds=OVERLAPPED_BURST_SECONDS if self.executor.facts.overlaps else BURST_SECONDS,
        )
        self._live: dict[str, Request] = {}
        self._num_in_flight: Counter[int] = Counter()  # bursts of each worker whose result was not taken yet
        self._dead: RemaskError | None = None
        self._when_swapped: Callable[[], None] | None = None
        self.weights_version = 0
        self.result: StepResult | None = None
        self._last_answer = time.monotonic()

    def add(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        *,
        priority: int | None = None,
    ) -> str:
        """Adds a request and returns its id.

        Args:
            prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: parameters of the request.
            priority: overrides the priority of `sampling_params`.

        Raises:
            InvalidRequest: a parameter is invalid; the error names it.
            Overloaded: the queue is full.
            EngineDead: the engine was closed or has failed.
            Unavailable: the engine has no workers left.
        """
        request = self.intake.request(self.intake.check(prompt, sampling_params, priority))
        self.admission.admit([request])
        self.add_request(request)
        return request.request_id

    def add_request(self, request: Request) -> None:
        """Adds a request that the intake has made and the admission has counted.

        Raises:
            EngineDead: the engine was closed or has failed.
            Unavailable: the engine has no workers left.
        """
        if self._dead is not None:
            self.admission.release(request)
            raise self._dead
        request.weights_version = self.weights_version
        self._live[request.request_id] = request
        self._scheduler.add(request)

    def swap_weights(self, then: Callable[[], None]) -> None:
        """Replaces the weights by those that the executor has staged, in a later step: requests that have
        started end on the old ones, and no other starts before.

        Args:
            then: called when the weights have been replaced.
        """
        self._scheduler.hold()
        self._when_swapped = then

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests. Ids that are not live are ignored."""
        self._scheduler.abort([request_id for request_id in request_ids if self._forget(request_id)])

    def has_answered(self, seconds: float) -> bool:
        """Whether workers run, and one has answered in the last seconds, or none of them has work."""
        is_idle = self._num_in_flight.total() == 0
        return len(self.executor.workers) > 0 and (is_idle or time.monotonic() - self._last_answer < seconds)

    def has_unfinished(self) -> bool:
        """Whether requests are live, bursts are in flight, or weights are to be replaced."""
        is_busy = self._scheduler.num_live > 0 or self._num_in_flight.total() > 0
        return is_busy or self._when_swapped is not None

    def step(self) -> list[Progress]:
        """Fills the workers' queues and waits for an event, at most `LISTEN_SECONDS`. An idle engine checks
        its workers and does not wait.

        Returns:
            An entry for each sample that a burst has advanced, and one for each request that has failed.

        Raises:
            EngineDead: every burst fails, or the executor has failed.
            Unavailable: no worker is running and none can be started.
        """
        self.result = None
        try:
            if self._when_swapped is not None and self._scheduler.is_drained:
                self._swap(self._when_swapped)
            self._fill()
            if convicted := self._scheduler.take_convicted():
                return self._progress(convicted)
            event = self.executor.next_event(LISTEN_SECONDS if self.has_unfinished() else 0.0)
            return [] if event is None else self._apply(event)
        except RemaskError as error:
            self._die(error)
            raise
        except BaseException as error:
            self._die(EngineDead(f"a burst failed: {error!r}; make a new LLM"))
            raise

    def close(self) -> None:
        """Drops all requests and frees the workers; idempotent."""
        self._die(EngineDead("the engine was closed; make a new LLM"))

    def _swap(self, then: Callable[[], None]) -> None:
        """Replaces the weights, and lets the requests that wait start."""
        self.executor.swap_weights()
        self._when_swapped, self.weights_version = None, self.weights_version + 1
        for request in self._scheduler.release():
            request.weights_version = self.weights_version
        then()

    def _fill(self) -> None:
        """Gives every worker one burst before any gets another."""
        executor = self.executor
        for depth in range(executor.queue_depth):
            wanting = [worker for worker in executor.workers if self._num_in_flight[worker] == depth]
            for worker in wanting:
                num_idle = sum(not self._num_in_flight[other] for other in executor.workers)
                batch = self._scheduler.next_batch(worker, num_idle=num_idle - (depth == 0))
                if batch is not None:
                    self._num_in_flight[worker] += 1
                    executor.submit(batch, worker)

    def _apply(self, event: Event) -> list[Progress]:
        """Passes an event to the scheduler."""
        if isinstance(event, Joined | Finished):
            self._last_answer = time.monotonic()
        if isinstance(event, Joined):
            return []
        if isinstance(event, Finished):
            self.result = event.result
            self._num_in_flight[event.worker] -= 1
            ended = self._scheduler.update(event.result)
            return self._progress(ended, self._scheduler.moved)
        del self._num_in_flight[event.worker]
        return self._progress(self._scheduler.lose(event.worker, died=event.died))

    def _progress(self, ended: Sequence[Request], moved: Sequence[Canvas] = ()) -> list[Progress]:
        """The progress of canvases that a burst has advanced; `ended` are the requests that have ended."""
        now = time.monotonic()
        decode, found = self.intake.decode, []
        by_id = {request.request_id: request for request in ended}
        for canvas in reversed(moved):  # the last of a request's canvases brings the output
            if (request := self._live.get(canvas.request_id)) is None:
                continue
            records = canvas.events[-1] if canvas.events else b""
            has_ended = by_id.pop(canvas.request_id, None) is not None
            found.append(Progress(canvas, records, request, has_ended, decode))
        found.reverse()
        found += [Progress(request.canvases[0], b"", request, True, decode) for request in by_id.values()]
        for request in ended:
            request.finish_time = now
            self._forget(request.request_id)
        return found

    def _forget(self, request_id: str) -> bool:
        """Releases a request; returns False if it is not live."""
        request = self._live.pop(request_id, None)
        if request is not None:
            self.admission.release(request)
        return request is not None

    def _die(self, error: RemaskError) -> None:
        if self._dead is None:
            self._dead = error
            for request_id in list(self._live):
                self._forget(request_id)
            self.executor.close()


def start_executor(options: EngineOptions, directory: Path) -> Executor:
    """Starts the workers.

    Args:
        options: the engine's.
        directory: the checkpoint.

    Raises:
        InvalidRequest: a worker or the cluster cannot do what the options ask for.
        Unavailable: Ray cannot be started, or workers die or take too long while they start.
    """
    on_ray = options.distributed_executor_backend == "ray"
    # Workers on Ray run in folders of their own; a relative path is the caller's.
    model = str(directory.absolute() if on_ray else directory)
    names = (name for name in WorkerSetup.__struct_fields__ if name != "model")
    setup = WorkerSetup(model=model, **{name: getattr(options, name) for name in names})
    if not on_ray:
        return InProcessExecutor(setup)

    from remask.workers.executors.ray_executor import RayExecutor

    return RayExecutor(
        setup,
        num_workers=options.data_parallel_size,
        num_cpus=options.num_cpus_per_worker,
        num_gpus=options.num_gpus_per_worker,
        placement_group=options.placement_group,
    )
