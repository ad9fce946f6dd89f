"""One engine with callers in many threads: shared steps, order of seeds, shutdown, interrupts and forks."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from remask import LLM, AsyncLLM, EngineDead, InvalidRequest, Overloaded
from remask.scheduler.messages import StepBatch
from remask.workers.worker import Worker

ASK = {"max_tokens": 40, "block_length": 40, "unmask": "schedule", "temperature": 1.0, "rank": "top"}
PROMPTS = [f"{i}+{7 * i}=" for i in range(100, 108)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", dtype="float32", max_num_rows=512, burst=1) as llm:
        yield llm


@pytest.fixture
def closing() -> Iterator[Callable[..., LLM]]:
    """Makes engines that are closed after the test."""
    made = []

    def make(**options: Any) -> LLM:
        made.append(LLM("tiny", device="cpu", dtype="float32", max_num_rows=512, burst=1, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


class Gate:
    """Holds the engine's thread in front of its next burst until `open` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self.bursts: list[int] = []  # how many canvases each holds
        launch: Callable[..., Any] = Worker.launch

        def held(worker: Worker, batch: StepBatch) -> Any:
            self.reached.set()
            assert self._opened.wait(30)
            self.bursts.append(len(batch.specs))
            return launch(worker, batch)

        monkeypatch.setattr(Worker, "launch", held)

    def open(self) -> None:
        self._opened.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also if the tests run in the background, where it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def texts(llm: LLM, prompts: list[str], **fields: Any) -> list[str | None]:
    return [output.outputs[0].text for output in llm.generate(prompts, {**ASK, **fields}, use_tqdm=False)]


def test_calls_of_several_threads_share_every_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [texts(llm, [prompt], seed=i) for i, prompt in enumerate(PROMPTS[:4])]
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(texts, llm, [prompt], seed=i) for i, prompt in enumerate(PROMPTS[:4])]
        until(lambda: llm.engine.num_live == 4)
        gate.open()
        assert [call.result(60) for call in calls] == alone
    assert max(gate.bursts) == 4


def test_seeds_of_a_call_follow_each_other_whatever_other_threads_do(closing: Callable[..., LLM]) -> None:
    def seeds(llm: LLM, count: int) -> list[int]:
        outputs = llm.generate([[5]] * count, {"max_tokens": 1}, use_tqdm=False)
        return [output.outputs[0].seed for output in outputs]

    in_turn = seeds(closing(seed=3), 80)
    llm = closing(seed=3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: seeds(llm, 10), range(8)))
    found.sort(key=lambda own: in_turn.index(own[0]))
    assert [seed for own in found for seed in own] == in_turn


def test_seeds_of_coroutines_follow_the_order_of_their_calls() -> None:
    async def seeds() -> list[int]:
        async def only(index: int) -> int:
            prompt = "1" * (1 + 4000 // (index + 1))  # the first takes longest to encode
            (output,) = [o async for o in engine.generate(prompt[:200], {"max_tokens": 1})]
            return output.outputs[0].seed

        async with await AsyncLLM.start("tiny", device="cpu", max_num_rows=512, seed=3) as engine:
            return await asyncio.gather(*map(only, range(16)))

    found = asyncio.run(seeds())
    with LLM("tiny", device="cpu", max_num_rows=512, seed=3) as llm:
        outputs = llm.generate([[5]] * 16, {"max_tokens": 1}, use_tqdm=False)
    assert found == [output.outputs[0].seed for output in outputs]


def test_close_from_another_thread_ends_a_call(
    closing: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, gate = closing(), Gate(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(texts, llm, PROMPTS)
        assert gate.reached.wait(30)
        closed = pool.submit(llm.close)
        gate.open()
        with pytest.raises(EngineDead, match="closed"):
            call.result(30)
        closed.result(30)
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("x")
    assert len(gate.bursts) == 1, "nothing runs after the burst that was under way"


def test_a_failed_engine_ends_the_calls_of_all_threads(
    closing: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, gate = closing(), Gate(monkeypatch)

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(texts, llm, [prompt]) for prompt in PROMPTS[:3]]
        until(lambda: llm.engine.num_live == 3)
        monkeypatch.setattr("remask.workers.executors.in_process.InProcessExecutor.submit", fail)
        gate.open()
        errors = [call.exception(30) for call in calls]
    assert all(isinstance(error, EngineDead) and "out of order" in str(error) for error in errors)
    assert len(set(map(id, errors))) == 3, "a traceback belongs to one thread"
    assert llm.engine.num_live == 0


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_is_forgotten_and_harms_no_other(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = texts(llm, PROMPTS[:1], seed=0)
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(texts, llm, PROMPTS[:1], seed=0)
        assert gate.reached.wait(30)
        main = threading.main_thread().ident
        assert main is not None
        interrupt = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            texts(llm, PROMPTS * 4)
        gate.open()
        assert other.result(60) == [expected]
    assert set(gate.bursts) == {1}
    assert llm.engine.num_live == 0


def test_a_dropped_engine_ends_its_thread() -> None:
    llm = LLM("tiny", device="cpu", max_num_rows=512)
    thread = llm.engine._thread
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_dropping_an_engine_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may drop it in a thread that holds a lock of Ray's which closing takes."""
    monkeypatch.setattr("remask.thread.DROP_SECONDS", 0.1)
    llm, lock = LLM("tiny", device="cpu", max_num_rows=512), threading.Lock()
    thread, engine = llm.engine._thread, llm.engine._engine
    close = engine.close

    def locked() -> None:
        with lock:
            close()

    monkeypatch.setattr(engine, "close", locked)
    held = [llm]
    del llm
    with lock:
        dropping = threading.Thread(target=lambda: (held.clear(), gc.collect()))
        dropping.start()
        dropping.join(30)
        assert not dropping.is_alive()
        assert thread.is_alive(), "it is closing"
    thread.join(30)
    assert not thread.is_alive()


def test_a_forked_child_is_told_at_once(llm: LLM) -> None:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            llm.close()  # is nothing of the child's
            llm.generate("x")
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer_pipe:
        answer = answer_pipe.read()
    os.wait()
    assert answer.startswith("EngineDead: the engine belongs to process")
    assert "spawn" in answer
    assert len(texts(llm, PROMPTS[:1])) == 1, "the engine lives on"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_queued_requests": 2}, "max_queued_requests 2"),
        ({"max_queued_tokens": 99}, "max_queued_tokens 99"),
    ],
    ids=str,
)
def test_a_call_above_a_ceiling_is_refused_while_others_are_live(
    closing: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, options: dict[str, int], named: str
) -> None:
    llm = closing(**options)
    with pytest.raises(InvalidRequest, match=named.replace(" ", "; a call may have at most ")):
        texts(llm, PROMPTS[:3])  # which waiting does not help
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(texts, llm, PROMPTS[:2])
        until(lambda: llm.engine.num_live == 2)
        with pytest.raises(Overloaded, match=named) as caught:
            texts(llm, PROMPTS[:1])
        assert caught.value.status == 429
        gate.open()
        assert len(first.result(60)) == 2
    assert len(texts(llm, PROMPTS[:2])) == 2, "what has ended does not count"


@pytest.mark.parametrize("name", ["max_queued_requests", "max_queued_tokens"])
def test_a_ceiling_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        LLM("tiny", **{name: 0})
