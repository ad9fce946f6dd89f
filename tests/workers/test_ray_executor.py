"""The executor on Ray without an engine: results that it reads, workers that it starts or gives up."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import ray

import remask.workers.executors.ray_pool as pool_module
from remask.embedded import model_directory
from remask.scheduler.blame import new_probe
from remask.scheduler.errors import Unavailable
from remask.scheduler.messages import StepBatch, StepResult
from remask.workers.executors.base import Event, Finished, Joined, Left
from remask.workers.executors.ray_actor import RemaskWorker
from remask.workers.executors.ray_executor import RayExecutor
from remask.workers.executors.ray_pool import Held, WorkerPool
from remask.workers.startup.setup import WorkerSetup

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MASK = 0  # of the tiny model


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def new_executor(num_workers: int) -> RayExecutor:
    with model_directory("tiny") as directory:
        setup = WorkerSetup(
            model=str(directory),
            dtype="float32",
            device="cpu",
            load_format="auto",
            batch_invariant=False,
            max_num_rows=512,
            attention_backend="auto",
            quantization=None,
            gpu_memory_utilization=0.9,
        )
        return RayExecutor(setup, num_workers=num_workers, num_cpus=1, num_gpus=0, placement_group=None)


@pytest.fixture(scope="module")
def shared(cluster: None) -> Iterator[RayExecutor]:
    executor = new_executor(2)
    yield executor
    executor.close()


@pytest.fixture
def pair(shared: RayExecutor) -> RayExecutor:
    """An executor with two workers."""
    shared.scale(2)
    events_until(shared, lambda _: len(shared.workers) == len(shared._pool.held) == 2)
    return shared


def events_until(executor: RayExecutor, is_enough: Callable[[list[Event]], bool]) -> list[Event]:
    """What the executor reports to an idle engine."""
    events: list[Event] = []
    deadline = time.monotonic() + 60
    while not is_enough(events) and time.monotonic() < deadline:
        event = executor.next_event(timeout=0)
        if event is not None:
            events.append(event)
        else:
            time.sleep(0.05)
    assert is_enough(events), events
    return events


def joined(events: list[Event]) -> bool:
    return isinstance(events[-1], Joined) if events else False


def left(events: list[Event]) -> bool:
    return isinstance(events[-1], Left) if events else False


def probe(executor: RayExecutor, burst_id: int) -> StepBatch:
    """A burst of one token."""
    canvas = new_probe(MASK)
    return StepBatch(burst_id=burst_id, num_steps=1, specs=[canvas.spec], states=[canvas.state])


def answer(burst_id: int) -> Any:
    """The ref of a burst's result that is there."""
    result = StepResult(burst_id=burst_id, states=[], num_rows=0, seconds=0.0)
    return ray.put(msgspec.msgpack.encode(result))


def process_of(executor: RayExecutor, worker: int) -> int:
    return ray.get(executor._pool.held[worker].actor.__ray_call__.remote(lambda _: os.getpid()))


def test_no_worker_starves_and_one_ray_wait_serves_many_results(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty-two workers whose next result is always there when the last one is taken."""
    calls = Counter[str]()
    real = ray.wait

    def wait(*args: Any, **options: Any) -> Any:
        calls["wait"] += 1
        return real(*args, **options)

    count, rounds = 32, 4
    numbers = range(1000, 1000 + count)
    actor = pair._pool.held[pair.workers[0]].actor
    pair._pool.held |= {
        number: Held(number, actor, None, 0.0, pinged=time.monotonic() + 1000) for number in numbers
    }
    monkeypatch.setattr(pair, "_target", 2 + count)
    monkeypatch.setattr(ray, "wait", wait)
    for number in numbers:
        pair._pool.held[number].bursts.append(answer(0))
    taken = Counter[int]()
    for _ in range(count * rounds):
        event = pair.next_event()
        assert isinstance(event, Finished)
        taken[event.worker] += 1
        pair._pool.held[event.worker].bursts.append(answer(0))
    for number in numbers:
        del pair._pool.held[number]
    pair._pool._list_workers()
    assert taken == dict.fromkeys(numbers, rounds)
    assert calls["wait"] <= 4 * rounds


def test_results_come_in_the_order_of_a_workers_bursts(pair: RayExecutor) -> None:
    for burst_id in (1, 2):
        for worker in pair.workers:
            pair.submit(probe(pair, burst_id), worker)
    finished: dict[int, list[int]] = {worker: [] for worker in pair.workers}
    for _ in range(4):
        event = pair.next_event()
        assert isinstance(event, Finished)
        finished[event.worker].append(event.result.burst_id)
    assert finished == {worker: [1, 2] for worker in pair.workers}


def test_a_worker_whose_answers_nobody_has_read_is_not_replaced(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PING_SECONDS", 0.0)
    monkeypatch.setattr(pool_module, "STALL_SECONDS", 0.5)
    before = pair.workers
    pair.submit(probe(pair, 1), before[0])
    pair._pool.look_soon()
    assert pair._pool.look(2, is_idle=True) is None  # heartbeats are in flight
    time.sleep(1)  # the engine is busy elsewhere
    assert isinstance(pair.next_event(), Finished)
    pair._pool.look_soon()
    assert pair.next_event(timeout=0) is None
    assert pair.workers == before


def test_a_wait_ends_in_time_if_nothing_happens(pair: RayExecutor) -> None:
    assert pair.next_event(timeout=0) is None
    assert pair.next_event(timeout=0.1) is None


def test_an_idle_executor_follows_scale_and_replaces_the_dead(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PING_SECONDS", 0.2)
    first, second = pair.workers
    pair.scale(1)
    assert events_until(pair, left) == [Left(second, died=False)]
    assert pair.workers == [first]
    os.kill(process_of(pair, first), signal.SIGKILL)
    died, came = events_until(pair, joined)
    assert died == Left(first, died=True)
    assert pair.workers == [came.worker]
    pair.scale(2)
    events_until(pair, joined)
    assert len(pair.workers) == 2


def test_a_worker_that_was_to_leave_stays_if_it_is_wanted_again(pair: RayExecutor) -> None:
    before = pair.workers
    held = pair._pool.held[before[1]]
    held.bursts.append(held.actor.__ray_call__.remote(lambda _: time.sleep(2)))
    pair.scale(1)
    assert pair.next_event(timeout=0) is None
    assert pair.workers == before[:1]
    pair.scale(2)
    assert pair.next_event(timeout=0) is None
    assert pair.workers == before
    held.bursts.clear()


def test_a_result_that_came_before_its_worker_died_is_not_lost(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PING_SECONDS", 0.2)
    held = pair._pool.held[pair.workers[0]]
    os.kill(process_of(pair, held.number), signal.SIGKILL)
    held.ping = held.actor.ping.remote()
    ray.wait([held.ping])
    pair._ready.clear()
    held.bursts.append(answer(7))
    pair._wait(0.0)
    pair._ready.rotate(1)  # the heartbeat's failure first
    finished, gone, _ = events_until(pair, joined)
    assert isinstance(finished, Finished)
    assert (finished.worker, finished.result.burst_id) == (held.number, 7)
    assert gone == Left(held.number, died=True)


def test_a_burst_that_cannot_be_sent_costs_its_worker_only(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor would wait for its number for ever."""

    class Broken:
        def remote(self, number: int, batch: bytes) -> None:
            raise MemoryError("no store takes it")

    victim, other = pair.workers
    monkeypatch.setattr(pair._pool.held[victim].actor, "run", Broken())
    pair.submit(probe(pair, 1), victim)
    pair.submit(probe(pair, 2), other)
    events = events_until(pair, lambda events: len(events) == 3)
    assert events[0] == Left(victim, died=True)
    assert {type(event) for event in events[1:]} == {Finished, Joined}


def test_a_start_that_takes_too_long_is_called_a_timeout_and_tried_again(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pair.workers
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.3)
    pair.scale(3)
    (gone,) = events_until(pair, left)
    assert isinstance(gone, Left)
    assert (gone.worker in before, gone.died) == (False, True)
    assert pair._pool.reason == "timeout: it was not ready within 0.3 s"
    monkeypatch.undo()
    assert pair.next_event(timeout=0.5) is None
    assert len(pair._pool.held) == 2, "the next one comes after a pause"
    monkeypatch.setattr(pool_module, "RETRY_SECONDS", 0.0)
    events_until(pair, joined)
    assert len(pair.workers) == 3
    pair.scale(2)
    events_until(pair, left)
    assert pair.workers == before


def test_an_idle_executor_without_workers_goes_on_trying(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a call that waits for a worker gives up."""

    def fail(pool: WorkerPool) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(pool_module, "PING_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "start", fail)
        for worker in list(pair.workers):  # the second one dies when starts have failed already
            os.kill(process_of(pair, worker), signal.SIGKILL)
            events_until(pair, left)
            for _ in range(4):
                assert pair.next_event(timeout=0) is None
                pair._pool._look_at = 0.0
        with pytest.raises(Unavailable, match="none is coming: no actor could be made: OSError"):
            pair.next_event()
    monkeypatch.setattr(pool_module, "RETRY_SECONDS", 0.0)
    events_until(pair, joined)


def test_first_workers_that_take_too_long_are_called_a_timeout(
    pair: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(RemaskWorker):
        def start(self, setup: bytes, weights: Any) -> bytes:
            time.sleep(100)
            return super().start(setup, weights)

    before = set(ray.util.list_named_actors())
    monkeypatch.setattr(pool_module, "RemaskWorker", Slow)
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.5)
    with pytest.raises(Unavailable, match=r"timeout: of 2 workers these were not ready within 0\.5 s: 0, 1"):
        new_executor(2)
    assert set(ray.util.list_named_actors()) == before
