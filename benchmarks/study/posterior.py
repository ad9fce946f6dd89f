"""The second stage: arms decode with a model that makes no error, so that what is wrong is the decoder's.

The model is the exact posterior of a Markov chain (`remask.benchmarks.exactness`). Reported for each setting
are the total variation distance and the divergence of the sequences written from the chain's distribution,
their entropy, and their forwards.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remask import LLM, SamplingParams
from remask.benchmarks import exactness
from remask.benchmarks.study.grid import WHOLE, Grid
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.params import resolve
from remask.workers.models.markov import write_markov

Row = dict[str, Any]


def settings(grid: Grid) -> list[Row]:
    """The settings of the second stage, as the first columns of its rows.

    Raises:
        InvalidRequest: policies are invalid or do not go together.
    """
    asked = grid.posterior
    if asked is None:
        return []
    found = []
    for name, block_length, temperature in itertools.product(
        asked.arms, asked.block_lengths, asked.temperatures
    ):
        arm = grid.arms[name]
        for threshold in asked.thresholds if arm.has_threshold else (None,):
            own = arm.at(threshold)
            whole = block_length == WHOLE or int(block_length) >= exactness.CANVAS_LEN
            row = {
                "arm": name,
                "unmask": own.unmask,
                "remask": own.remask,
                "threshold": threshold,
                "block_length": None if whole else int(block_length),
                "temperature": temperature,
                "rank": asked.rank,
                "num_samples": asked.num_samples,
            }
            try:
                resolve(_params(row, 0, 1))
            except InvalidRequest as error:
                raise error.at(f"posterior, arm {name!r}") from None
            found.append(row)
    return found


def measure(
    wanted: Sequence[Row],
    done: list[Row],
    save: Callable[[list[Row]], None],
    progress: Callable[[int, int], None],
) -> None:
    """Measures the settings that have not been measured yet.

    Args:
        wanted: all settings.
        done: rows of the first of them; later ones are appended.
        save: called with them after each setting.
        progress: called with the settings done and all.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_markov(Path(directory), exactness.INITIAL, exactness.TRANSITION)
        with LLM(directory) as llm:
            for setting in wanted[len(done) :]:
                done.append({**setting, **_measured(llm, setting)})
                save(done)
                progress(len(done), len(wanted))


def of_the_chain(num_samples: int) -> Row:
    """The figures of as many samples of the chain itself: what a decoder without error has."""
    drawn = np.random.default_rng(0).multinomial(num_samples, exactness.chain_distribution())
    return exactness.figures(drawn)


def _measured(llm: LLM, setting: Row) -> Row:
    counts = [
        min(exactness.SAMPLES_A_REQUEST, setting["num_samples"] - first)
        for first in range(0, setting["num_samples"], exactness.SAMPLES_A_REQUEST)
    ]
    params = [_params(setting, seed, n) for seed, n in enumerate(counts)]
    outputs = llm.generate([[exactness.START]] * len(params), params, use_tqdm=False)
    samples = [sample for output in outputs for sample in output.outputs]
    written = exactness.counts_of([tuple(sample.token_ids) for sample in samples])
    nfe = float(np.mean([sample.nfe for sample in samples]))
    return {**exactness.figures(written), "nfe": round(nfe, 3)}


def _params(setting: Row, seed: int, n: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=exactness.CANVAS_LEN,
        block_length=setting["block_length"] or exactness.CANVAS_LEN,
        unmask=setting["unmask"],
        remask=setting["remask"],
        temperature=setting["temperature"],
        rank=setting["rank"],
        seed=seed,
        n=n,
    )
