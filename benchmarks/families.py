"""How much of its matrix rate each model family reaches: whole forwards of random weights.

    python -m remask.benchmarks.families --output benchmarks/results/families.json

Each model takes the same step: 4 canvases of 32 masks behind prompts of 96 tokens, 512 rows, under one
schedule. A row meets 75 to 76 million weights in each, without the head. `llada-124m` is dense, `dream-124m`
has grouped heads, biases and a wider MLP, and `llada-moe-a124m` has 64 experts of 212, of which a row takes
8: as many numbers as the dense MLP.

In each repetition every model takes its step, and before and after it runs nothing but the products that the
step needs (`remask.benchmarks.utilization`; of experts the active ones, joined). The *share of the matrix
rate* is the ratio of the arithmetic rates. *Times the dense model's time* is a ratio within a repetition.
Everything runs in fp32 on one CPU thread.
"""

from __future__ import annotations

import time
from typing import Any

from remask.benchmarks import repeated
from remask.benchmarks.environment import Steadiness
from remask.benchmarks.gpu import timing
from remask.benchmarks.throughput import find_model, format_spread, spread
from remask.benchmarks.utilization import Work, gemm_rate
from remask.scheduler.messages import StepBatch
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.worker import Worker

DENSE = "llada-124m"
MODELS = (DENSE, "dream-124m", "llada-moe-a124m")
NUM_CANVASES, PROMPT_LEN, CANVAS_LEN = 4, 96, 32
PACK = (NUM_CANVASES * (PROMPT_LEN + CANVAS_LEN), NUM_CANVASES * CANVAS_LEN)  # rows and candidates
HEADER = ("model", "ms a step", "share of the matrix rate", "times the dense model's time")


def step(model: TransformerDenoiser) -> tuple[float, float]:
    """Seconds of a step, and the share of the matrix rate that it reaches."""
    own = timing.canvases(model.config, NUM_CANVASES, PROMPT_LEN, CANVAS_LEN)
    batch = StepBatch(burst_id=0, num_steps=1, specs=[c.spec for c in own], states=[c.state for c in own])
    rate = gemm_rate(model.model, [PACK])
    with Work() as work:
        started = time.perf_counter()
        Worker(model).run(batch)
        seconds = time.perf_counter() - started
    assert work.packs == [PACK], "all canvases take one forward"
    rate = (rate + gemm_rate(model.model, [PACK])) / 2
    return seconds, work.flops / seconds / rate


def measure(repetitions: int, steadiness: Steadiness) -> list[dict[str, Any]]:
    """A result of each model."""
    models: dict[str, TransformerDenoiser] = {}
    for name in MODELS:
        directory, load_format = find_model(name)
        models[name] = load_denoiser(directory, dtype="float32", device="cpu", load_format=load_format)
        step(models[name])  # warms up
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in MODELS}
    for _ in range(repetitions):
        for name, model in models.items():
            found[name].append(step(model))
        steadiness.look()
    dense = [seconds for seconds, _ in found[DENSE]]
    return [
        {
            "model": name,
            "step_ms": spread([1000 * seconds for seconds, _ in own]),
            "share_of_matrix_rate": spread([share for _, share in own]),
            "times_dense": spread([seconds / base for (seconds, _), base in zip(own, dense, strict=True)]),
        }
        for name, own in found.items()
    ]


def cells(result: dict[str, Any]) -> list[str]:
    """A model's line of the table."""
    return [
        result["model"],
        f"{result['step_ms']['median']:.0f}",
        format_spread(result["share_of_matrix_rate"]),
        format_spread(result["times_dense"]),
    ]


def main() -> None:
    repeated.run(__doc__, HEADER, cells, measure, repetitions=9)


if __name__ == "__main__":
    main()
