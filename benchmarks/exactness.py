"""How far each policy's text is from the model's own distribution, with a model that makes no error itself.

    python -m remask.benchmarks.exactness --output benchmarks/results/exactness.json

The model is the exact posterior of a Markov chain (`remask.workers.models.markov`), so that the decoder
makes all errors of a text. Reported are the total variation distance and the Kullback-Leibler divergence
between the sequences written and the chain's distribution, and the entropy of the sequences in bits
(Miller-Madow), over block lengths and temperatures, with confidence ranked by the row's largest probability.
A finite sample of the chain itself has a distance, too: the first row gives it, and a policy at or below it
is not distinguishable from exact.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from remask import LLM, SamplingParams
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.throughput import write_report
from remask.workers.models.markov import write_markov

INITIAL = (0.6, 0.4)
TRANSITION = ((0.85, 0.15), (0.25, 0.75))
START, CANVAS_LEN = 0, 10
BLOCK_LENS = (2, 5, 10)
TEMPERATURES = (0.7, 1.0)
SAMPLES_A_REQUEST = 1024
CHAIN = "the chain itself"
POLICIES: dict[str, dict[str, Any]] = {
    "one token a step, random order": {"unmask": "schedule:score=random"},
    "one token a step": {"unmask": "schedule"},
    "two tokens a step": {"unmask": f"schedule:steps={CANVAS_LEN // 2}"},
    "threshold 0.9": {"unmask": "threshold:0.9"},
    "threshold 0.7": {"unmask": "threshold:0.7"},
    "factor 1.0": {"unmask": "factor:1.0"},
    "entropy bound 0.5": {"unmask": "entropy_bound:0.5"},
    "Bernoulli": {"unmask": "bernoulli"},
    "capped 0.5": {"unmask": "capped_threshold:0.5"},
    "capped 0.5, WINO 0.3": {"unmask": "capped_threshold:0.5", "remask": "wino:0.3"},
    "capped 0.5, WINO 0.8": {"unmask": "capped_threshold:0.5", "remask": "wino:0.8"},
    "capped 0.5, random like WINO 0.8": {"unmask": "capped_threshold:0.5", "remask": "random:t2=0.8"},
    "capped 0.5, low probability 0.3": {
        "unmask": "capped_threshold:0.5",
        "remask": "low_prob:0.3,post_steps=16",
    },
    "capped 0.5, oracle 0.8": {"unmask": "capped_threshold:0.5", "remask": "oracle_loo:0.8"},
    "capped 0.5, WINO 0.8, removed banned": {
        "unmask": "capped_threshold:0.5",
        "remask": "wino:0.8,ban_old=true",
    },
    "Saber": {"remask": "saber"},
    "RCR, five steps": {"unmask": f"schedule:steps={CANVAS_LEN // 2}", "remask": "rcr"},
    "ReMDM cap": {"remask": "remdm:schedule=cap"},
    "ReMDM rescale 0.5": {"remask": "remdm:schedule=rescale,eta=0.5"},
    "ReMDM conf": {"remask": "remdm:schedule=conf"},
    "Dream origin": {"unmask": "dream:alg=origin"},
    "Dream entropy, five steps": {"unmask": f"dream:steps={CANVAS_LEN // 2}"},
}
WHOLE_CANVAS = ("Dream origin", "Dream entropy, five steps")  # one block, whatever its length


def chain_distribution() -> NDArray[np.float64]:
    """p of every sequence behind `START`, in the order of `itertools.product`."""
    sequences = itertools.product(range(len(INITIAL)), repeat=CANVAS_LEN)
    return np.array(
        [np.prod([TRANSITION[a][b] for a, b in itertools.pairwise((START, *rest))]) for rest in sequences]
    )


def counts_of(sequences: list[tuple[int, ...]]) -> NDArray[np.int64]:
    """How often each sequence was written, in the same order."""
    found = Counter(sequences)
    return np.array([found[rest] for rest in itertools.product(range(len(INITIAL)), repeat=CANVAS_LEN)])


def figures(counts: NDArray[np.int64]) -> dict[str, float]:
    """Total variation distance and divergence from the chain, and entropy; the latter in bits."""
    share, chain = counts / counts.sum(), chain_distribution()
    seen = share[share > 0]
    entropy = -(seen * np.log2(seen)).sum() + (len(seen) - 1) / (2 * counts.sum() * np.log(2))
    return {
        "distance": round(float(abs(share - chain).sum() / 2), 4),
        "divergence_bits": round(float(-(share * np.log2(chain)).sum() - entropy), 3),
        "entropy_bits": round(float(entropy), 3),
    }


def measure(llm: LLM, policy: str, block_len: int, temperature: float, count: int) -> dict[str, Any]:
    """What `count` samples of one policy write."""
    params = SamplingParams(
        max_tokens=CANVAS_LEN, block_length=block_len, temperature=temperature, rank="top", **POLICIES[policy]
    )
    setting = {"policy": policy, "block_length": block_len, "temperature": temperature}
    return {**setting, **sampled(llm, params, count)}


def sampled(llm: LLM, params: SamplingParams, count: int) -> dict[str, float]:
    """The figures of `count` samples, and their mean forwards."""
    sizes = [min(SAMPLES_A_REQUEST, count - first) for first in range(0, count, SAMPLES_A_REQUEST)]
    each = [msgspec.structs.replace(params, n=size, seed=seed) for seed, size in enumerate(sizes)]
    outputs = llm.generate([[START]] * len(each), each, use_tqdm=False)
    samples = [sample for output in outputs for sample in output.outputs]
    written = figures(counts_of([tuple(sample.token_ids) for sample in samples]))
    return {**written, "nfe": round(float(np.mean([sample.nfe for sample in samples])), 2)}


def sampled_chain(count: int) -> dict[str, float]:
    """The figures of as many samples of the chain itself."""
    drawn = np.random.default_rng(0).multinomial(count, chain_distribution())
    return figures(drawn)


def table_cells(policy: str, results: list[dict[str, Any]]) -> list[str]:
    """A policy's row of the README table: distance, bits and forwards by block length, at temperature 1."""
    row = [policy]
    for block_len in BLOCK_LENS:
        wanted = (policy, block_len, 1.0)
        own = [
            r
            for r in results
            if (r["policy"], r.get("block_length", block_len), r.get("temperature", 1.0)) == wanted
        ]
        row += [f"{own[0]['distance']:.3f}", f"{own[0]['entropy_bits']:.2f}"] if own else ["", ""]
        row += [f"{own[0]['nfe']:.1f}" if own and "nfe" in own[0] else ""]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=8 * SAMPLES_A_REQUEST, help="samples of each setting")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.count < SAMPLES_A_REQUEST or args.count % SAMPLES_A_REQUEST:
        parser.error(f"--count must be a multiple of {SAMPLES_A_REQUEST}")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = [{"policy": CHAIN, **sampled_chain(args.count)}]
    settings = [
        (policy, block_len, temperature)
        for policy, block_len, temperature in itertools.product(POLICIES, BLOCK_LENS, TEMPERATURES)
        if policy not in WHOLE_CANVAS or block_len == CANVAS_LEN
    ]
    with tempfile.TemporaryDirectory() as directory:
        write_markov(Path(directory), INITIAL, TRANSITION)
        with LLM(directory) as llm:
            for policy, block_len, temperature in track(settings, console=Console(stderr=True)):
                results.append(measure(llm, policy, block_len, temperature, args.count))
    columns = [f"{what}/{n}" for n in BLOCK_LENS for what in ("distance", "bits", "NFE")]
    title = f"{args.count} samples at temperature 1, by block length"
    table = Table("policy", *columns, title=title)
    for policy in (CHAIN, *POLICIES):
        table.add_row(*table_cells(policy, results))
    Console().print(table)
    if args.output is not None:
        report = {"environment": environment_stamp(), "count": args.count, "results": results}
        write_report(report, args.output)


if __name__ == "__main__":
    main()
