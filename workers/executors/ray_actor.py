"""The Ray actor of a worker. Messages are bytes. It owns the weights and no state of requests."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import ray
import torch

from remask.scheduler.messages import StepBatch
from remask.workers.models.shared import SharedWeights
from remask.workers.startup.host_memory import available_bytes
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import measure_knee, start_worker
from remask.workers.worker import Worker

QUEUE_DEPTH = 2  # bursts in flight, including the running one


class RemaskWorker:
    """A worker in a process of its own.

    Args:
        num_threads: number of threads for computation.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._worker: Worker | None = None
        self._decoder = msgspec.msgpack.Decoder(StepBatch)  # msgspec crashes if two threads make it at once
        self._launching, self._num_launched = threading.Condition(), 0

    def start(self, setup: bytes, weights: SharedWeights | None) -> bytes:
        """Loads the model and returns encoded `WorkerFacts`. (Ray drops the type of constructors' errors.)"""
        torch.set_num_threads(self._num_threads)  # set for each thread; Ray chooses the thread
        self._setup = msgspec.msgpack.decode(setup, type=WorkerSetup)
        self._worker, facts = start_worker(self._setup, weights)
        return msgspec.msgpack.encode(facts)

    def knee(self) -> int:
        """See `measure_knee`."""
        assert self._worker is not None, "it has not started"
        return measure_knee(self._worker, self._setup)

    @ray.method(concurrency_group="bursts")
    def run(self, number: int, batch: bytes) -> bytes:
        """Runs a burst and returns its result. Bursts are launched in the order of their numbers (0, 1, ...).
        On a GPU the next burst runs while the result of this one is read and sent."""
        assert self._worker is not None, "it has not started"
        torch.set_num_threads(self._num_threads)
        with self._launching:
            self._launching.wait_for(lambda: self._num_launched == number)
            try:
                launched = self._worker.launch(self._decoder.decode(batch))
            finally:
                self._num_launched += 1
                self._launching.notify_all()
        return msgspec.msgpack.encode(self._worker.collect(launched))

    @ray.method(concurrency_group="weights")
    def host_memory(self) -> tuple[str, int | None]:
        """The node, and the bytes of its memory that are free."""
        return ray.get_runtime_context().get_node_id(), available_bytes()

    @ray.method(concurrency_group="weights")
    def stage(self, weights: str | SharedWeights) -> None:
        """See `Worker.stage`; a text is the path of a directory."""
        assert self._worker is not None, "it has not started"
        torch.set_num_threads(self._num_threads)
        self._worker.stage(Path(weights) if isinstance(weights, str) else weights)

    @ray.method(concurrency_group="weights")
    def discard(self) -> None:
        """See `Worker.discard`."""
        assert self._worker is not None, "it has not started"
        self._worker.discard()

    @ray.method(concurrency_group="weights")
    def swap(self) -> None:
        """See `Worker.swap`."""
        assert self._worker is not None, "it has not started"
        torch.set_num_threads(self._num_threads)
        self._worker.swap()

    @ray.method(concurrency_group="health")
    def ping(self) -> None:
        """Answers while a burst runs."""
