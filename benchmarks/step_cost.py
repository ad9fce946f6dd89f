"""What a denoising step costs beside the model: planning, packing, policies and updates.

    python -m remask.benchmarks.step_cost

The batch has 64 puzzles of all kinds under every policy of the tiny model's table; each has taken one step.
The cost of a step is everything but the model itself (`Denoiser.statistics`): packing, policies and updates.
The cost of a burst, paid once a burst, is reported separately: canvases to tensors, plans, and tensors back
to canvases. A step may take 5 ms. A *rebuild* makes a burst of 256 canvases out of its message, where all but
one stay from the burst before. It may take 8 ms of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.throughput import find_model, spread, write_report
from remask.benchmarks.tiny.policies import POLICIES, params
from remask.benchmarks.tiny.tasks import PUZZLES
from remask.scheduler.canvas import Canvas, CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.text import load_tokenizer
from remask.workers.burst.state import BurstState
from remask.workers.head import Statistics
from remask.workers.models.denoiser import Denoiser, load_denoiser
from remask.workers.rows.pack import HeadQuery, PackedRows
from remask.workers.step import denoise, plan_packs
from remask.workers.worker import Worker

SEED = 2**31 + 4
REBUILT = 256  # canvases of the burst that is rebuilt
DECODER = msgspec.msgpack.Decoder(StepBatch)


class Timed(Denoiser):
    """A model that adds up its own seconds and counts the forwards."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.seconds, self.config = inner, 0.0, inner.config
        self.mask_id, self.device, self.pack_rows = inner.mask_id, inner.device, inner.pack_rows

    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        started = time.perf_counter()
        found = self.inner.statistics(rows, query)
        self.seconds += time.perf_counter() - started
        return found


def puzzles(directory: Path, model: Denoiser, count: int) -> list[Canvas]:
    """Canvases of all puzzles in turn, under the policies in turn; one step taken, none finished."""
    tokenizer = load_tokenizer(directory, required=True)
    assert tokenizer is not None, "it is required"
    rng = np.random.default_rng(SEED)
    kinds, policies = list(PUZZLES.values()), list(POLICIES)
    canvases: list[Canvas] = []
    worker = Worker(model)
    for i in itertools.count():
        puzzle = kinds[i % len(kinds)]
        (text,), _ = puzzle.held_out(rng, 1)
        own = resolve(params(policies[i // len(kinds) % len(policies)], puzzle.answer_len))
        ids = tokenizer.encode(text)
        canvas = new_canvas(str(i), i, ids, own, seed=i, sample=0, mask_id=model.mask_id, stop_ids=[])
        first = StepBatch(burst_id=0, num_steps=1, specs=[canvas.spec], states=[canvas.state])
        (canvas.state,) = worker.run(first).states
        if not canvas.state.finished:
            canvases.append(canvas)
        if len(canvases) == count:
            return canvases
    raise AssertionError("puzzles never end")


@torch.inference_mode()
def one_step(model: Denoiser, canvases: list[Canvas]) -> dict[str, float]:
    """Milliseconds of a burst of one step: of the model, of the step without the model, and of the burst
    without the step."""
    timed = Timed(model)
    started = time.perf_counter()
    state = BurstState([c.spec for c in canvases], [c.state for c in canvases])
    plans = plan_packs(state, timed, timed.pack_rows)
    ready = time.perf_counter()
    denoise(state, plans, timed)
    done = time.perf_counter()
    state.to_states()
    ended = time.perf_counter()
    return {
        "model_ms": 1000 * timed.seconds,
        "step_beside_model_ms": 1000 * (done - ready - timed.seconds),
        "burst_beside_step_ms": 1000 * (ready - started + ended - done),
    }


def one_rebuild(model: Denoiser, canvases: list[Canvas]) -> float:
    """Milliseconds of one thread from the message of a burst to its plans, where all canvases but the last
    one stay from the burst before: decoding, tensors, and packing."""
    states: list[CanvasState | int] = [*range(len(canvases) - 1), canvases[-1].state]
    specs = [canvas.spec for canvas in canvases]
    message = msgspec.msgpack.encode(
        StepBatch(burst_id=1, num_steps=1, follows=0, specs=specs, states=states)
    )
    started = time.thread_time()
    batch = DECODER.decode(message)
    kept = [
        (specs[own], canvases[own].state) if isinstance(own, int) else (spec, own)
        for spec, own in zip(batch.specs, batch.states, strict=True)
    ]
    plan_packs(BurstState([spec for spec, _ in kept], [own for _, own in kept]), model, model.pack_rows)
    return 1000 * (time.thread_time() - started)


def measure(count: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Median, least and most of each figure of `one_step`."""
    directory, _ = find_model("tiny")
    model = load_denoiser(directory, dtype="float32", device="cpu")
    canvases = puzzles(directory, model, count)
    one_step(model, canvases)
    runs = [one_step(model, canvases) for _ in range(repetitions)]
    figures = {name: spread([run[name] for run in runs]) for name in runs[0]}
    many = puzzles(directory, model, REBUILT)
    one_rebuild(model, many)
    rebuilds = [one_rebuild(model, many) for _ in range(repetitions)]
    return {**figures, "rebuild_ms": spread(rebuilds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64, help="canvases")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.count < 1 or args.repetitions < 1:
        parser.error("--count and --repetitions must be at least 1")
    torch.set_num_threads(1)
    report = {
        "environment": environment_stamp(),
        "canvases": args.count,
        "repetitions": args.repetitions,
        "results": measure(args.count, args.repetitions),
    }
    table = Table("part of a step", "median ms", "min", "max", title=f"{args.count} canvases")
    for name, result in report["results"].items():
        table.add_row(name, *(f"{result[kind]:.2f}" for kind in ("median", "min", "max")))
    Console().print(table)
    if args.output is not None:
        write_report(report, args.output)


if __name__ == "__main__":
    main()
