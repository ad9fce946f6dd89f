"""`Engine`: requests in, bursts to the workers, progress out. `LLM`, `AsyncLLM` and batch files use it.

A step schedules bursts, waits for one to come back and applies its result. An engine has no thread of its own
(`EngineThread` has one), and knows neither tensors nor which request a caller waits for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from remask.embedded import model_directory
from remask.intake import Intake, Prompt
from remask.limits import Admission
from remask.options import EngineOptions
from remask.outputs import RequestOutput, Trace, request_output, trace_of
from remask.scheduler.canvas import Canvas, new_probe
from remask.scheduler.errors import EngineDead, RemaskError
from remask.scheduler.params import SamplingParams
from remask.scheduler.planning import BURST_SECONDS, OVERLAPPED_BURST_SECONDS
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler
from remask.text import load_tokenizer
from remask.workers.executors.base import Event, Executor, Finished, InProcessExecutor, Joined
from remask.workers.startup.setup import WorkerSetup

LISTEN_SECONDS = 0.02  # a step of workers elsewhere ends by then, to let newcomers go to idle ones


class Progress:
    """What a step has done for one sample of a request.

    Attributes:
        request_id: whose sample it is.
        has_ended: the request has ended, with all its samples.
    """

    def __init__(
        self,
        canvas: Canvas,
        records: bytes,
        request: Request | None,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        self.request_id, self.has_ended = canvas.request_id, request is not None
        self._spec, self._state, self._records = canvas.spec, canvas.state, records
        self._request, self._decode = request, decode

    @property
    def sample(self) -> int:
        """Which of the n samples."""
        return self._spec.sample

    @property
    def num_stable_tokens(self) -> int:
        """Tokens of the finished blocks, which cannot change any more."""
        return min(self._state.block * self._spec.block_length, self._spec.canvas_len)

    @cached_property
    def events(self) -> Trace | None:
        """The commits and remaskings of the burst; None if the request is not traced."""
        return trace_of(self._spec, self._records) if self._spec.trace else None

    @cached_property
    def output(self) -> RequestOutput | None:
        """The output of the request if it has ended. It is made when it is first read, in any thread, so that
        no step waits for the decoding of text."""
        return None if self._request is None else request_output(self._request, self._decode)


class Engine:
    """A model, its workers and the queue in front of them.

    All methods are called from one thread, but those of `intake` and `admission`.

    Args:
        options: parsed ones.
        executor: workers that have started; None: they are started.

    Attributes:
        tokenizer: the model's; None: there is none.
        executor: the workers.
        intake: makes validated requests.
        admission: counts the requests that have not ended.

    Raises:
        InvalidRequest: an option or a file of the checkpoint is at fault; it is named.
        Unavailable: Ray cannot be started, or workers die or take too long while they start.
    """

    def __init__(self, options: EngineOptions, executor: Executor | None = None) -> None:
        with model_directory(options.model) as directory:
            # The tokenizer first: it is small, and what is wrong with it shows before weights are read.
            self.tokenizer = load_tokenizer(
                directory if options.tokenizer is None else Path(options.tokenizer),
                required=options.tokenizer is not None,
            )
            self.executor = executor or start_executor(options, directory)
        config = self.executor.facts.config
        try:
            self.intake = Intake(config, self.tokenizer, options)
        except BaseException:
            self.executor.close()
            raise
        self.admission = Admission(options)
        self._scheduler = Scheduler(
            max_num_rows=self.executor.max_num_rows,
            max_num_seqs=options.max_num_seqs,
            burst=options.burst,
            probe=new_probe(config.mask_id),
            burst_seconds=OVERLAPPED_BURST_SECONDS if self.executor.facts.overlaps else BURST_SECONDS,
        )
        self._live: dict[str, Request] = {}
        self._num_in_flight: Counter[int] = Counter()  # bursts of each worker whose result was not taken yet
        self._dead: RemaskError | None = None

    def add(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        *,
        priority: int | None = None,
    ) -> str:
        """Takes a request; returns its id.

        Args:
            prompt: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: its parameters.
            priority: overrides that of the parameters.

        Raises:
            InvalidRequest: naming the parameter at fault.
            Overloaded: more is live than the options allow.
            EngineDead: the engine was closed or has failed.
            Unavailable: it has no workers any more.
        """
        request = self.intake.request(self.intake.check(prompt, sampling_params, priority))
        self.admission.admit([request])
        self.add_request(request)
        return request.request_id

    def add_request(self, request: Request) -> None:
        """Takes a request that the intake has made and the admission has counted.

        Raises:
            EngineDead: the engine was closed or has failed.
            Unavailable: it has no workers any more.
        """
        if self._dead is not None:
            self.admission.release(request)
            raise self._dead
        self._live[request.request_id] = request
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests. Ids that are not live are passed over."""
        self._scheduler.abort([request_id for request_id in request_ids if self._forget(request_id)])

    def has_unfinished(self) -> bool:
        """Whether a step has something to do."""
        return self._scheduler.num_live > 0 or self._num_in_flight.total() > 0

    def step(self) -> list[Progress]:
        """Fills the workers' queues and waits until something happens, or for a moment. If there is nothing
        to do, it looks after the workers and does not wait.

        Returns:
            An entry for each sample that a burst has taken further, and one for each request that has failed.

        Raises:
            EngineDead: every burst fails, or the executor has failed.
            Unavailable: there is no worker, and none is coming.
        """
        try:
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
        """Forgets all requests and frees the workers; idempotent."""
        self._die(EngineDead("the engine was closed; make a new LLM"))

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
        """Tells the scheduler what has happened."""
        if isinstance(event, Joined):
            return []
        if isinstance(event, Finished):
            self._num_in_flight[event.worker] -= 1
            ended = self._scheduler.update(event.result)
            return self._progress(ended, self._scheduler.moved)
        del self._num_in_flight[event.worker]
        return self._progress(self._scheduler.lose(event.worker, died=event.died))

    def _progress(self, ended: Sequence[Request], moved: Sequence[Canvas] = ()) -> list[Progress]:
        """Progress of canvases that a burst has taken further; `ended` are the requests that have ended."""
        now = time.monotonic()
        by_id = {request.request_id: request for request in ended}
        for request in ended:
            request.finish_time = now
            self._forget(request.request_id)
        decode, found = self.intake.decode, []
        for canvas in reversed(moved):  # the last of a request's canvases brings the output
            records = canvas.events[-1] if canvas.events else b""
            found.append(Progress(canvas, records, by_id.pop(canvas.request_id, None), decode))
        found.reverse()
        return found + [Progress(request.canvases[0], b"", request, decode) for request in by_id.values()]

    def _forget(self, request_id: str) -> bool:
        """Releases a request; False: it is not live."""
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
