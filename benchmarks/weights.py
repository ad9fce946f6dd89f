"""New weights under load: what `update_weights` takes, and that each output has the text of its version.

    python -m remask.benchmarks.weights --output benchmarks/results/weights.json

Two checkpoints of 124 M parameters with random weights, fp32, one thread a worker, under `batch_invariant`.
Eight clients ask in a closed loop for 16 tokens behind 16 (4 forwards), and each repetition takes the other
checkpoint. *Reading alone* loads it while the engine is idle. An engine in this process, and two workers on
Ray.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from remask import LLM, RequestOutput
from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import find_model, spread
from remask.engine import Engine
from remask.options import EngineOptions
from remask.thread import EngineThread
from remask.workers.models.dummy import dummy_model
from remask.workers.models.loading import destinations, load_checkpoint, read_config

MODEL, DTYPE = "llada-124m", "float32"
NUM_CLIENTS, NUM_PROMPTS = 8, 16
SAMPLING = {"max_tokens": 16, "block_length": 16, "unmask": "schedule:steps=4", "ignore_eos": True}
HEADER = (
    *("workers", "requests", "failed", "not the text of their version"),
    *("reading alone, s", "reading under load, s", "what runs ends, s", "swap, s"),
)


def write_checkpoints(directory: Path) -> list[Path]:
    """Two checkpoints of one shape."""
    shape, _ = find_model(MODEL)
    model, (family, _) = dummy_model(shape, dtype=DTYPE), read_config(shape)
    tensors = destinations(model, family.tensor_names(model.config))
    found = [directory / "first", directory / "second"]
    for version, path in enumerate(found):
        path.mkdir()
        (path / "config.json").write_bytes((shape / "config.json").read_bytes())
        save_file(
            {name: own.roll(version, 0).contiguous() for name, own in tensors.items()},
            path / "model.safetensors",
        )
    return found


def prompts_of(vocab_size: int) -> list[list[int]]:
    """Prompts of 16 tokens."""
    bound = vocab_size // 2
    return [[(7 * number + 31 * place) % bound for place in range(16)] for number in range(NUM_PROMPTS)]


class Clients:
    """Clients of an engine, each of which asks again when it is answered."""

    def __init__(self, engine: EngineThread, prompts: list[list[int]]) -> None:
        self._engine, self._prompts = engine, prompts
        self.outputs: list[tuple[int, RequestOutput]] = []
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(own,)) for own in range(NUM_CLIENTS)]

    def _ask(self, number: int) -> None:
        while not self._ends.is_set():
            index = number % NUM_PROMPTS
            requests = self._engine.intake.requests([self._prompts[index]], SAMPLING)
            self.outputs += [(index, output) for output in self._engine.serve(requests)]
            number += NUM_CLIENTS

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ends.set()
            for thread in self._threads:
                thread.join()


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The call, which notes how long it takes."""

    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    return run


def measure_engine(
    checkpoints: list[Path],
    texts: list[list[list[int]]],
    repetitions: int,
    steadiness: Steadiness,
    num_workers: int,
) -> dict[str, Any]:
    """A result of an engine in this process (0 workers on Ray), or on Ray."""
    on_ray = {"distributed_executor_backend": "ray", "data_parallel_size": num_workers} if num_workers else {}
    options = {"dtype": DTYPE, "device": "cpu", "batch_invariant": True, "max_num_rows": 512}
    core = Engine(EngineOptions.parse(model=checkpoints[0], **options, **on_ray))
    engine, executor = EngineThread(core), core.executor
    staged, swapped, waited, alone = [], [], [], []
    for name, seconds in (("stage_weights", staged), ("swap_weights", swapped)):
        setattr(executor, name, timed(getattr(executor, name), seconds))
    clients = Clients(engine, prompts_of(engine.intake.config.vocab_size))
    for number in range(repetitions):
        started = time.perf_counter()
        load_checkpoint(checkpoints[(number + 1) % 2], dtype=DTYPE)
        alone.append(time.perf_counter() - started)
        steadiness.look()
    with clients.running():
        for number in range(repetitions):
            time.sleep(5)
            started = time.perf_counter()
            engine.update_weights(checkpoints[(number + 1) % 2])
            waited.append(time.perf_counter() - started - staged[-1] - swapped[-1])
        time.sleep(5)
    engine.close()
    wrong = [
        output
        for index, output in clients.outputs
        if output.error is None and output.outputs[0].token_ids != texts[output.weights_version % 2][index]
    ]
    return {
        "workers": num_workers,
        "requests": len(clients.outputs),
        "versions": sorted({output.weights_version for _, output in clients.outputs}),
        "failed": sum(output.error is not None for _, output in clients.outputs),
        "wrong": len(wrong),
        "alone_s": spread(alone),
        "read_s": spread(staged),
        "wait_s": spread(waited),
        "swap_s": spread(swapped),
    }


def measure(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    """A result of an engine in this process, and one of two workers on Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="remask-weights-") as directory:
        checkpoints, texts = write_checkpoints(Path(directory)), []
        for path in checkpoints:
            with LLM(path, dtype=DTYPE, device="cpu", batch_invariant=True, max_num_rows=512) as llm:
                prompts = prompts_of(llm.engine.intake.config.vocab_size)
                outputs = llm.generate(prompts, SAMPLING, use_tqdm=False)
                texts.append([output.outputs[0].token_ids for output in outputs])
        assert all(a != b for a, b in zip(*texts, strict=True)), "the checkpoints write different texts"
        return [measure_engine(checkpoints, texts, repetitions, steadiness, workers) for workers in (0, 2)]


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        "in process" if result["workers"] == 0 else f"{result['workers']} on Ray",
        *(str(result[name]) for name in ("requests", "failed", "wrong")),
        *(f"{result[name]['median']:.2f}" for name in ("alone_s", "read_s", "wait_s", "swap_s")),
    ]


def main() -> None:
    repeated.run(__doc__, HEADER, cells, measure, repetitions=6)


if __name__ == "__main__":
    main()
