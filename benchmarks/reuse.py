"""What reused keys bring: the engine with `reuse` against itself without, and against a plain cached loop.

    python -m remask.benchmarks.reuse --output benchmarks/results/reuse.json

The model has the shape of `llada-124m` and random weights. Prompts have 128 tokens, canvases 256 in blocks of
32. Under `schedule:80` each block takes ten forwards, of which one is full. Under thresholds, which differ
from request to request, four of five blocks take 6 to 14 forwards. The plain loop is written as the published
dual cache (`plain_cache`), one request at a time. Everything runs in fp32 on one CPU thread. All sides run in
turn in every repetition, and ratios are taken within it.

The engine with `reuse` fills the canvases of all requests, and the loop those of the first four. Exact
decoding ends when as many blocks are finished as there are requests. All its forwards compute the same rows,
so that its speed is that of its forwards, by the number of forwards that the finished blocks took.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remask import SamplingParams
from remask.benchmarks import plain_cache, repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import find_model, format_spread, spread
from remask.engine import Engine
from remask.options import EngineOptions
from remask.scheduler.canvas import TOKEN, CanvasState
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

MODEL, PROMPT_LEN, CANVAS_LEN, BLOCK_LEN, NUM_LOOPED, SEED = "llada-124m", 128, 256, 32, 4, 5
THRESHOLDS = (0.8, 0.82, 0.84, 0.86)
HEADER = (
    *("requests", "policy", "forwards of a block (10th to 90th percentile)", "exact", "reuse=both"),
    *("times exact (min to max)", "times the plain loop (min to max)"),
)


class Load(NamedTuple):
    """Requests.

    Attributes:
        num_requests: how many, all at once.
        unmask: their policies, in turn.
        has_loop: whether the plain loop serves them, too.
    """

    num_requests: int
    unmask: Sequence[str]
    has_loop: bool = False


LOADS = (
    Load(4, ("schedule:80",)),
    Load(16, ("schedule:80",), has_loop=True),
    Load(16, [f"threshold:{t}" for t in THRESHOLDS]),
)


def params_of(load: Load, reuse: str | None) -> list[SamplingParams]:
    shape = {"max_tokens": CANVAS_LEN, "block_length": BLOCK_LEN, "ignore_eos": True}
    return [
        SamplingParams(**shape, unmask=load.unmask[number % len(load.unmask)], reuse=reuse)
        for number in range(load.num_requests)
    ]


def measure(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    """A result of each load."""
    directory, load_format = find_model(MODEL)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "load_format": load_format}
    model = load_denoiser(directory, **options)
    rng = np.random.default_rng(SEED)
    prompts = rng.integers(3, model.config.vocab_size - 1000, (16, PROMPT_LEN)).tolist()
    engine = Engine(EngineOptions(model=str(directory), max_num_rows=4096, **options))

    def run(load: Load, side: str) -> Speed:
        own = params_of(load, None if side == "exact" else "both")
        if side == "loop":
            return Speed(loop_speed(model, prompts[:NUM_LOOPED], own), [])
        return engine_speed(engine, prompts[: load.num_requests], own, is_whole=side == "both")

    results = []
    for load in LOADS:
        sides = ["exact", "both", *(["loop"] if load.has_loop else [])]
        speeds: dict[str, list[Speed]] = {side: [] for side in sides}
        for repetition in range(repetitions):
            for side in sides[:: -1 if repetition % 2 else 1]:
                speeds[side].append(run(load, side))
            steadiness.look()
        results.append(_result(load, speeds))
    engine.close()
    return results


class Speed(NamedTuple):
    """How fast a side was.

    Attributes:
        tokens_per_second: visible tokens.
        block_forwards: forwards of each finished block; none for the loop.
    """

    tokens_per_second: float
    block_forwards: list[int]


def engine_speed(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], *, is_whole: bool
) -> Speed:
    """The speed of the engine on whole canvases, or on their first blocks; then all forwards must cost the
    same."""
    states: dict[str, CanvasState] = {}
    stable: dict[str, int] = {}
    wanted = len(prompts) * (CANVAS_LEN if is_whole else BLOCK_LEN)
    started = time.perf_counter()
    ids = [engine.add(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    while sum(stable.values()) < wanted:
        for progress in engine.step():
            states[progress.request_id] = progress.state
            stable[progress.request_id] = progress.num_stable_tokens
    seconds = time.perf_counter() - started
    engine.abort(ids)
    while engine.has_unfinished():
        engine.step()
    forwards = [
        count
        for name, state in states.items()
        for count in block_forwards(np.frombuffer(state.commit_steps, TOKEN)[: stable[name]])
    ]
    num_forwards = sum(state.num_forwards for state in states.values())
    return Speed(BLOCK_LEN / (np.mean(forwards).item() * seconds / num_forwards), forwards)


def loop_speed(model: TransformerDenoiser, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Tokens a second of the plain loop."""
    started = time.perf_counter()
    for prompt, own in zip(prompts, params, strict=False):
        plain_cache.decode(model, prompt, own)
    return len(prompts) * CANVAS_LEN / (time.perf_counter() - started)


def block_forwards(commit_steps: NDArray[np.int32]) -> list[int]:
    """The forwards of each block, by the forward that committed each token."""
    return np.diff(commit_steps.reshape(-1, BLOCK_LEN).max(1), prepend=0).tolist()


def deciles(forwards: list[int]) -> dict[str, float]:
    """10th percentile, median and 90th percentile of the forwards of a block."""
    found = np.percentile(forwards, [10, 50, 90]).round(1).tolist()
    return dict(zip(("p10", "median", "p90"), found, strict=True))


def _result(load: Load, speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    rates = {side: [own.tokens_per_second for own in found] for side, found in speeds.items()}
    return {
        "num_requests": load.num_requests,
        "unmask": list(load.unmask),
        "block_forwards": {side: deciles(speeds[side][-1].block_forwards) for side in ("exact", "both")},
        "tokens_per_second": {side: spread(own) for side, own in rates.items()},
        "ratio": {
            side: spread([own / base for own, base in zip(rates["both"], rates[side], strict=True)])
            for side in rates
            if side != "both"
        },
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A load's line of the table."""
    rates, ratio, forwards = result["tokens_per_second"], result["ratio"], result["block_forwards"]["both"]
    first, last = result["unmask"][0], result["unmask"][-1]
    return [
        str(result["num_requests"]),
        f"`{first}`" if first == last else f"`{first}` to `{last.partition(':')[2]}`",
        f"{forwards['median']:.0f} ({forwards['p10']:.0f} to {forwards['p90']:.0f})",
        f"{rates['exact']['median']:.1f} tokens/s",
        f"{rates['both']['median']:.1f} tokens/s",
        format_spread(ratio["exact"]),
        format_spread(ratio["loop"]) if "loop" in ratio else "",
    ]


def main() -> None:
    repeated.run(__doc__, HEADER, cells, measure, repetitions=2)


if __name__ == "__main__":
    main()
