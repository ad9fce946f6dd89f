"""The second stage: arms decode with a model that makes no error, so that what is wrong is the decoder's.

The model is the exact posterior of a Markov chain (`remask.benchmarks.exactness`). Reported for each setting
are the total variation distance and the divergence of the sequences written from the chain's distribution,
their entropy, and their forwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remask import LLM, SamplingParams
from remask.benchmarks import exactness
from remask.benchmarks.study.grid import Grid, arm_settings
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
    for setting in arm_settings(grid, asked, exactness.CANVAS_LEN):
        row = {**setting, "rank": asked.rank, "num_samples": asked.num_samples}
        try:
            resolve(_params(row))
        except InvalidRequest as error:
            raise error.at(f"posterior, arm {row['arm']!r}") from None
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
                own = exactness.sampled(llm, _params(setting), setting["num_samples"])
                done.append({**setting, **own})
                save(done)
                progress(len(done), len(wanted))


def _params(setting: Row) -> SamplingParams:
    return SamplingParams(
        max_tokens=exactness.CANVAS_LEN,
        block_length=setting["block_length"] or exactness.CANVAS_LEN,
        unmask=setting["unmask"],
        remask=setting["remask"],
        temperature=setting["temperature"],
        rank=setting["rank"],
    )
