"""New weights for the workers of an engine on Ray.

A worker reads a directory itself. Tensors of the caller go to the object store once, and the workers of a
node share that copy. The store keeps it for workers that start later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from remask.scheduler.errors import InvalidRequest, RemaskError, Unavailable
from remask.workers.executors.base import Left
from remask.workers.executors.ray_pool import START_SECONDS, Held, WorkerPool, explain
from remask.workers.executors.ray_session import RaySession
from remask.workers.models.loading import read_config
from remask.workers.models.shared import share
from remask.workers.models.update import Weights, read_weights
from remask.workers.startup.host_memory import available_bytes, check_room
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.start import WorkerFacts

CHECK_SECONDS = 1.0  # between two looks at whether Ray still runs


class RayWeights:
    """Stages weights on the workers of a pool, and swaps them.

    Args:
        pool: the workers.
        session: that of the engine.
        setup: what the workers were started with.
        facts: what they have reported.
    """

    def __init__(self, pool: WorkerPool, session: RaySession, setup: WorkerSetup, facts: WorkerFacts) -> None:
        self._pool, self._session, self._setup, self._facts = pool, session, setup, facts
        self._staged: tuple[set[int], WorkerSetup, Any] | None = None

    def stage(self, weights: Weights) -> None:
        """See `Executor.stage_weights`."""
        held = [own for own in list(self._pool.held.values()) if own.start is None]
        setup, source = self._setup, None
        if isinstance(weights, Path) and setup.load_format != "object_store":
            setup = msgspec.structs.replace(setup, model=str(weights.absolute()), load_format="auto")
            self._check_room(held, weights, shared=False)
        else:
            self._check_room(held, weights, shared=True)
            source = self._put(weights)
        staged, error = self._ask(held, "stage", setup.model if source is None else source)
        if error is None and not staged:
            error = Unavailable(f"no worker could read the new weights: {self._pool.reason}")
        if error is not None:
            self._ask(held, "discard")
            raise error
        self._staged = set(staged), setup, source

    def swap(self) -> list[Left]:
        """See `Executor.swap_weights`; from the thread of the engine.

        Returns:
            The workers that have ended because they do not have the new weights.
        """
        assert self._staged is not None, "weights are staged"
        (numbers, self._setup, source), self._staged = self._staged, None
        self._pool.renew(msgspec.msgpack.encode(self._setup), source)
        held = list(self._pool.held.values())
        swapped, _ = self._ask([own for own in held if own.number in numbers], "swap")
        without = [own for own in held if own.number not in swapped]
        for own in without:
            self._pool.drop(own)
        return [Left(own.number, died=False) for own in without]

    def _check_room(self, held: Sequence[Held], weights: Weights, *, shared: bool) -> None:
        """Raises InvalidRequest if the memory of a node is too small. The workers of a node share one copy,
        or have one each. This process makes a copy, and puts another one into the object store."""
        size = self._facts.weight_bytes
        if size is None:
            return  # a worker refuses them
        if shared:
            check_room(2 * size, available_bytes(), weights)
        rooms, _ = self._ask(held, "host_memory")
        copies = Counter(node for node, _ in rooms.values())
        for node, available in dict(rooms.values()).items():
            check_room(size * (1 if shared else copies[node]), available, weights, f"node {node}")

    def _put(self, weights: Weights) -> Any:
        """A reference to weights as arrays that workers share."""
        if self._facts.weights_dtype is None:
            raise InvalidRequest("weights", weights, "cannot be replaced: the model is no transformer")
        _, config = read_config(Path(self._setup.model))
        return ray.put(share(read_weights(weights, config, getattr(torch, self._facts.weights_dtype))))

    def _ask(
        self, held: Sequence[Held], method: str, *args: Any
    ) -> tuple[dict[int, Any], RemaskError | None]:
        """Calls a method of workers.

        Returns:
            The answers by worker, and the first error. A worker that has died has neither.
        """
        deadline = time.monotonic() + START_SECONDS
        waited = {getattr(own.actor, method).remote(*args): own.number for own in held}
        answers: dict[int, Any] = {}
        first: RemaskError | None = None
        while waited and time.monotonic() < deadline:
            self._session.check()
            ready, _ = ray.wait(list(waited), num_returns=1, timeout=CHECK_SECONDS)
            for ref in ready:
                number = waited.pop(ref)
                try:
                    answers[number] = ray.get(ref)
                except RayTaskError as error:
                    if isinstance(error.cause, InvalidRequest):
                        first = first or error.cause.at(f"worker {number}")
                    else:
                        first = first or Unavailable(
                            f"{method} has failed on worker {number}: {explain(error)}"
                        )
                except RayError as error:
                    self._pool.reason = explain(error)
        if waited:
            late = ", ".join(map(str, waited.values()))
            first = first or Unavailable(f"timeout: {method} took workers {late} over {START_SECONDS:g} s")
        return answers, first
