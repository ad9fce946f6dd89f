"""`Engine`: what a caller that steps it sees, and what becomes of bursts whose results are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest

from remask import Engine, EngineDead, EngineOptions, InvalidRequest, Overloaded, Progress, Trace
from remask.scheduler.messages import StepBatch
from remask.workers.executors.base import Event, Left
from remask.workers.executors.in_process import InProcessExecutor
from remask.workers.startup.setup import WorkerSetup

PROMPT = [33, 11, 12, 14]
ASK: dict[str, Any] = {"max_tokens": 22, "block_length": 8, "temperature": 2.0, "rank": "top", "seed": 5}
POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.4"},
    {"unmask": "capped_threshold:0.05", "remask": "wino:t2=0.9"},
    {"remask": "saber:4,2"},
    {"remask": "remdm:10,rescale,0.5"},
]


@pytest.fixture
def make(golden_checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines that are closed after the test."""
    made = []

    def make(executor: InProcessExecutor | None = None, **options: Any) -> Engine:
        given = {"dtype": "float32", "device": "cpu", "max_num_rows": 512, "burst": 1, **options}
        made.append(Engine(EngineOptions.parse(model=golden_checkpoint, **given), executor))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def finish(engine: Engine) -> list[Progress]:
    found = []
    while engine.has_unfinished():
        found += engine.step()
    return found


def joined(traces: list[Trace]) -> list[list[Any]]:
    """The events of traces one behind the other."""
    lists = [(t.step, t.position, t.block, t.token, t.is_commit, t.confidence) for t in traces]
    return [[*chain.from_iterable(parts)] for parts in zip(*lists, strict=True)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_progress_tells_the_events_of_each_burst_and_the_output_all_of_them(
    make: Callable[..., Engine], policy: dict[str, Any]
) -> None:
    engine = make(burst=2)
    engine.add(PROMPT, {**ASK, **policy, "n": 2, "trace": True})
    found = finish(engine)
    output = found[-1].output
    assert output is not None
    for sample in output.outputs:
        own = [progress.events for progress in found if progress.sample == sample.index]
        assert joined([events for events in own if events is not None]) == joined([sample.trace])  # type: ignore[list-item]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_stable_tokens_are_never_changed_again(make: Callable[..., Engine], policy: dict[str, Any]) -> None:
    engine = make()
    engine.add(PROMPT, {**ASK, **policy, "ignore_eos": True, "trace": True})
    found = finish(engine)
    counts = [progress.num_stable_tokens for progress in found]
    assert counts == sorted(counts)
    assert {8, 16, 22} <= {*counts} <= {0, 8, 16, 22}
    num_stable = 0
    for progress in found:
        assert progress.events is not None
        assert min(progress.events.position, default=99) >= num_stable
        num_stable = progress.num_stable_tokens


def test_a_request_brings_one_output_and_it_comes_last(make: Callable[..., Engine]) -> None:
    engine = make(max_num_seqs=3)
    ids = [engine.add(PROMPT, {**ASK, "n": n, "max_tokens": 8 * n}) for n in (1, 3, 2)]
    by_id = sorted(finish(engine), key=lambda progress: ids.index(progress.request_id))
    for request_id, group in groupby(by_id, key=lambda progress: progress.request_id):
        *before, last = group
        assert {progress.output for progress in before} == {None}
        assert last.has_ended
        assert last.output is not None
        assert last.output.request_id == request_id
        assert last.events is None, "it is not traced"
    assert engine.admission.num_requests == engine.admission.num_tokens == 0


def test_an_aborted_request_tells_no_more_and_makes_room(make: Callable[..., Engine]) -> None:
    engine = make(max_queued_requests=1)
    request_id = engine.add(PROMPT, ASK)
    with pytest.raises(Overloaded, match="max_queued_requests 1"):
        engine.add(PROMPT, ASK)
    engine.step()
    engine.abort([request_id, "unknown"])
    assert finish(engine) == []
    kept = engine.add(PROMPT, ASK)
    assert {progress.request_id for progress in finish(engine)} == {kept}


def test_a_closed_engine_and_a_bad_request_are_refused_and_leave_nothing(make: Callable[..., Engine]) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match="max_tokens"):
        engine.add(PROMPT, {"max_tokens": 0})
    engine.add(PROMPT, ASK)
    engine.close()
    with pytest.raises(EngineDead):
        engine.add(PROMPT, ASK)
    assert engine.admission.num_requests == 0


class Losing(InProcessExecutor):
    """Runs every burst, and loses the result of every third."""

    num_lost = 0

    def submit(self, batch: StepBatch, worker: int) -> None:
        self.last = batch
        super().submit(batch, worker)

    def next_event(self, timeout: float | None = None) -> Event | None:
        event = super().next_event(timeout)
        if event is None or self.last.burst_id % 3 != 1:
            return event
        self.num_lost += 1
        return Left(0, died=False)


def test_a_replayed_burst_tells_its_events_once(make: Callable[..., Engine], golden_checkpoint: Path) -> None:
    setup = WorkerSetup(
        model=str(golden_checkpoint), dtype="float32", device="cpu", max_num_rows=512, batch_invariant=True
    )
    losing = Losing(setup)
    found = []
    for executor in (None, losing):
        engine = make(executor, batch_invariant=True)
        engine.add(PROMPT, {**ASK, **POLICIES[1], "trace": True})
        output = finish(engine)[-1].output
        assert output is not None
        found.append(output.outputs[0])
    assert losing.num_lost > 2
    assert found[0] == found[1]
