"""What reused keys bring: the engine with `reuse` against itself without, and against a plain cached loop.

    python -m remask.benchmarks.reuse --output benchmarks/results/reuse.json

The model has the shape of `llada-124m` and random weights. Prompts have 128 tokens, canvases 256 in blocks of
32. Under `schedule:80` each block takes ten forwards, of which one is full. Under thresholds, which differ
from request to request, blocks take unequal numbers of forwards. The plain loop is written as the published
dual cache (`plain_cache`), one request at a time. Everything runs in fp32 on one CPU thread. All sides run in
turn in every repetition, and ratios are taken within it.

All blocks cost the same, so that a run ends when as many tokens are final as the first blocks of all
requests hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remask import LLM, SamplingParams
from remask.benchmarks import plain_cache, repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.throughput import find_model, format_spread, spread
from remask.engine import Progress
from remask.scheduler.canvas import TOKEN
from remask.workers.models.denoiser import load_denoiser

MODEL, PROMPT_LEN, CANVAS_LEN, BLOCK_LEN, NUM_BLOCKS, SEED = "llada-124m", 128, 256, 32, 1, 5
THRESHOLDS = (0.88, 0.9, 0.92, 0.94)
HEADER = (
    *("requests", "policy", "forwards of a block (min to max)", "exact", "reuse=both"),
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
    results = []
    with LLM(directory, max_num_rows=4096, **options) as llm:

        def engine(load: Load, reuse: str | None) -> list[int]:
            return first_blocks(llm, prompts[: load.num_requests], params_of(load, reuse))

        def plain(load: Load) -> list[int]:
            own = params_of(load, "both")
            return [
                plain_cache.decode(model, prompt, own[n], NUM_BLOCKS * BLOCK_LEN).nfe
                for n, prompt in enumerate(prompts)
            ]

        for load in LOADS:
            sides: dict[str, Callable[[], list[int]]] = {
                "exact": lambda load=load: engine(load, None),
                "both": lambda load=load: engine(load, "both"),
            }
            if load.has_loop:
                sides["loop"] = lambda load=load: plain(load)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            forwards: dict[str, list[int]] = {}
            for repetition in range(repetitions):
                for name in list(sides)[:: -1 if repetition % 2 else 1]:
                    started = time.perf_counter()
                    forwards[name] = sides[name]()
                    seconds[name].append(time.perf_counter() - started)
                steadiness.look()
            results.append(_result(load, seconds, forwards))
    return results


class Enough(Exception):
    """As many tokens are final as a run asks for."""


def first_blocks(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[int]:
    """Decodes until as many tokens are final as the first blocks of all requests hold; returns the forwards
    of finished blocks."""
    stable: dict[str, int] = {}
    steps: dict[str, NDArray[np.int32]] = {}

    def note(progress: Progress) -> None:
        stable[progress.request_id] = progress.num_stable_tokens
        steps[progress.request_id] = np.frombuffer(progress.state.commit_steps, TOKEN)
        if sum(stable.values()) >= len(prompts) * NUM_BLOCKS * BLOCK_LEN:
            raise Enough

    with suppress(Enough):
        llm.generate(prompts, params, use_tqdm=False, on_progress=note)
    return [count for name, own in steps.items() for count in block_forwards(own[: stable[name]])]


def block_forwards(commit_steps: NDArray[np.int32]) -> list[int]:
    """The forwards of each block, by the forward that committed each token."""
    return np.diff(commit_steps.reshape(-1, BLOCK_LEN).max(1), prepend=0).tolist()


def _result(load: Load, seconds: dict[str, list[float]], forwards: dict[str, list[int]]) -> dict[str, Any]:
    num_tokens = load.num_requests * NUM_BLOCKS * BLOCK_LEN
    rates = {name: [num_tokens / own for own in times] for name, times in seconds.items()}
    ratios = {
        name: spread([own / base for own, base in zip(rates["both"], rates[name], strict=True)])
        for name in rates
        if name != "both"
    }
    return {
        "num_requests": load.num_requests,
        "unmask": list(load.unmask),
        "block_forwards": {name: spread(forwards[name]) for name in ("exact", "both")},
        "tokens_per_second": {name: spread(own) for name, own in rates.items()},
        "ratio": ratios,
    }


def cells(result: dict[str, Any]) -> list[str]:
    """A load's line of the table."""
    rates, ratio, forwards = result["tokens_per_second"], result["ratio"], result["block_forwards"]["both"]
    first, last = result["unmask"][0], result["unmask"][-1]
    return [
        str(result["num_requests"]),
        f"`{first}`" if first == last else f"`{first}` to `{last.partition(':')[2]}`",
        format_spread(forwards, 0),
        f"{rates['exact']['median']:.1f} tokens/s",
        f"{rates['both']['median']:.1f} tokens/s",
        format_spread(ratio["exact"]),
        format_spread(ratio["loop"]) if "loop" in ratio else "",
    ]


def main() -> None:
    repeated.run(__doc__, HEADER, cells, measure, repetitions=3)


if __name__ == "__main__":
    main()
