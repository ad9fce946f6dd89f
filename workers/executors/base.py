"""What executors have in common: they get bursts to workers and results back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.models.update import Weights
from remask.workers.startup.start import WorkerFacts


class Finished(NamedTuple):
    """A burst has come back."""

    worker: int
    result: StepResult


class Joined(NamedTuple):
    """A worker has started and answered."""

    worker: int


class Left(NamedTuple):
    """A worker is gone, with its bursts."""

    worker: int
    died: bool  # False: it was stopped on purpose


Event: TypeAlias = Finished | Joined | Left


class Executor(ABC):
    """Runs bursts somewhere. Results of one worker come in the order of its bursts.

    Attributes:
        facts: facts about the model that the workers report.
        max_num_rows: maximum rows of a batch: the option, or the knee, within the memory of the workers.
        workers: numbers of the workers that take bursts; a worker that is replaced gets a new number.
        queue_depth: bursts of a worker, including the running one; more than one, so that it does not wait
            for the host.
    """

    facts: WorkerFacts
    max_num_rows: int
    workers: Sequence[int] = (0,)
    queue_depth: int = 1

    @abstractmethod
    def submit(self, batch: StepBatch, worker: int) -> None:
        """Sends a burst to a worker."""

    @abstractmethod
    def next_event(self, timeout: float | None = None) -> Event | None:
        """Waits for an event, and checks and replaces workers.

        Args:
            timeout: seconds; None: no limit. A worker in the caller's process finishes its burst first.

        Returns:
            The event; None if there was none in time.

        Raises:
            EngineDead: the workers can no longer be reached.
            Unavailable: no worker is running and none can be started.
        """

    @abstractmethod
    def scale(self, num_workers: int) -> None:
        """Changes the number of workers, from any thread. It takes effect in `next_event`."""

    @abstractmethod
    def stage_weights(self, weights: Weights) -> None:
        """Reads and checks new weights in host memory for every worker, while bursts run. From any thread,
        but not twice at a time.

        Args:
            weights: where they are.

        Raises:
            InvalidRequest: a worker refuses them, or its machine has too little memory. Nothing has changed.
            Unavailable: no worker could read them.
        """

    @abstractmethod
    def swap_weights(self) -> None:
        """Gives every worker, and those that start from now on, the staged weights. No burst is in flight."""

    @abstractmethod
    def close(self) -> None:
        """Frees the workers; idempotent."""
