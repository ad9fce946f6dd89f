"""What it costs that the requests of a batch ask for different policies.

    python -m remask.benchmarks.mixed_policies --output benchmarks/results/mixed_policies.json

64 half-filled canvases in one batch, five or six under each of twelve (unmask, remask, temperature) triples,
take a step. Then, for each triple, the same 64 canvases take the step under that triple alone. The mean of
these times is weighted by the triples' shares in the mix, so that both sides do the same work on the same
rows, but the mix does it in one batch. Repetitions are interleaved; the cost of mixing is the ratio within
one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from remask import SamplingParams
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.step_cost import one_step
from remask.benchmarks.throughput import find_model, spread, write_report
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.params import resolve
from remask.workers.models.denoiser import Denoiser, load_denoiser

SEED = 2**31 + 5
PROMPT_LEN, CANVAS_LEN = 36, 40
TRIPLES: tuple[dict[str, Any], ...] = (
    {"unmask": "schedule"},
    {"unmask": "schedule:score=random", "temperature": 0.7},
    {"unmask": "threshold:0.9"},
    {"unmask": "threshold:0.95", "remask": "low_prob:0.3", "temperature": 1.0},
    {"unmask": "factor:0.5"},
    {"unmask": "capped_threshold:0.9", "remask": "wino:0.9"},
    {"unmask": "capped_threshold:0.9", "remask": "wino:0.9", "temperature": 1.0},
    {"unmask": "entropy_bound:0.1"},
    {"unmask": "bernoulli:4.0", "temperature": 0.5},
    {"unmask": "dream:alg=origin", "temperature": 1.0},
    {"unmask": "schedule:20", "remask": "rcr"},
    {"remask": "saber", "temperature": 0.8},
)


def half_filled(model: Denoiser, vocab_size: int, triples: list[int]) -> list[Canvas]:
    """A canvas for each entry of `triples`, which says its triple; every other token is a random one."""
    rng = np.random.default_rng(SEED)
    canvases = []
    for i, triple in enumerate(triples):
        params = resolve(SamplingParams(max_tokens=CANVAS_LEN, block_length=CANVAS_LEN, **TRIPLES[triple]))
        prompt = rng.integers(1, vocab_size, size=PROMPT_LEN).tolist()
        canvas = new_canvas(str(i), i, prompt, params, seed=i, sample=0, mask_id=model.mask_id, stop_ids=[])
        tokens = canvas.state.token_array().copy()
        tokens[PROMPT_LEN::2] = rng.integers(1, vocab_size, size=CANVAS_LEN // 2)
        canvas.state = msgspec.structs.replace(canvas.state, tokens=tokens.tobytes())
        canvases.append(canvas)
    return canvases


def measure(count: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step of the mix, of the weighted mean of the uniform batches, and their ratio."""
    directory, _ = find_model("tiny")
    model = load_denoiser(directory, dtype="float32", device="cpu")
    turns = [i % len(TRIPLES) for i in range(count)]
    vocab_size = model.config.vocab_size
    mixed = half_filled(model, vocab_size, turns)
    uniform = [half_filled(model, vocab_size, [triple] * count) for triple in range(len(TRIPLES))]

    def milliseconds(canvases: list[Canvas]) -> float:
        return sum(one_step(model, canvases).values())

    times, means = [], []
    for repetition in range(repetitions + 1):
        each = [milliseconds(canvases) for canvases in uniform]
        times.append(milliseconds(mixed))
        means.append(sum(turns.count(triple) * ms for triple, ms in enumerate(each)) / count)
        if repetition == 0:  # the first warms up
            times, means = [], []
    return {
        "mixed_ms": spread(times),
        "uniform_ms": spread(means),
        "ratio": spread([a / b for a, b in zip(times, means, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64, help="canvases")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.count < 1 or args.repetitions < 1:
        parser.error("--count and --repetitions must be at least 1")
    torch.set_num_threads(1)
    results = measure(args.count, args.repetitions)
    Console().print(results)
    if args.output is not None:
        report = {
            "environment": environment_stamp(),
            "canvases": args.count,
            "triples": list(TRIPLES),
            "repetitions": args.repetitions,
            "results": results,
        }
        write_report(report, args.output)


if __name__ == "__main__":
    main()
