"""What a forward costs: microseconds for each policy, block length and task, measured alone.

A cell shares its batches with others, so it has no seconds of its own. Its time is this cost times its
forwards. Batches of all settings are interleaved, so that a slow moment of the machine falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from remask import LLM
from remask.benchmarks.study.grid import Cell
from remask.benchmarks.study.tasks import StudyTask

BATCH = 64  # canvases of a batch, if the task has as many prompts
ENOUGH_SECONDS = 10.0
ONE_REPETITION = 0.1  # what a single repetition may be wrong by, as a share


class Cost(msgspec.Struct, frozen=True):
    """The cost of a setting.

    Attributes:
        task, arm, block_length, draws: the setting; `draws`: tokens are drawn.
        threshold: the one that was measured.
        microseconds: of a forward, the median of the repetitions.
        repetitions: microseconds of each repetition.
        nfe: mean forwards of a sample.
        canvases: of a batch.
    """

    task: str
    arm: str
    block_length: int | None
    draws: bool
    threshold: float | None
    microseconds: float
    repetitions: list[float]
    nfe: float
    canvases: int = BATCH

    @property
    def seconds(self) -> float:
        """What its batches took."""
        return sum(self.repetitions) * self.nfe * self.canvases / 1e6

    @property
    def scatter(self) -> float:
        """How much slower the slowest repetition is than the fastest, as a share; `ONE_REPETITION` of one."""
        if len(self.repetitions) < 2:
            return ONE_REPETITION
        return max(self.repetitions) / min(self.repetitions) - 1

    @property
    def key(self) -> Key:
        return Key(self.task, self.arm, self.block_length, self.draws)


class Key(NamedTuple):
    """The settings that have one cost."""

    task: str
    arm: str
    block_length: int | None
    draws: bool


def key_of(cell: Cell) -> Key:
    """The settings of a cell that its cost depends on."""
    return Key(cell.task, cell.arm, cell.block_length, cell.temperature > 0)


def measure(
    llm: LLM,
    cells: Sequence[Cell],
    tasks: Mapping[str, StudyTask],
    seed: int,
    repetitions: int,
    done: Sequence[Cost],
    save: Callable[[list[Cost]], None],
    progress: Callable[[int, int], None],
) -> None:
    """Measures the costs of all cells, as far as they are not measured yet.

    Args:
        llm: the engine of the study.
        cells: of the grid.
        tasks: of the grid.
        seed: of the prompts.
        repetitions: batches of each setting. A setting whose batches took `ENOUGH_SECONDS` needs no more.
        done: what was saved before.
        save: called with all costs after each batch.
        progress: called with the batches done and all batches.
    """
    batch = _canvases_by_task(cells)
    found = {cost.key: cost for cost in done if cost.canvases == batch.get(cost.task)}
    chosen = _middle_of_each_key(cells)
    for repetition in range(repetitions):
        for index, cell in enumerate(chosen):
            cost = found.get(key_of(cell))
            if cost is not None and (len(cost.repetitions) > repetition or cost.seconds > ENOUGH_SECONDS):
                continue
            progress(repetition * len(chosen) + index, repetitions * len(chosen))
            microseconds, nfe = _measured(llm, cell, tasks[cell.task], seed, batch[cell.task])
            every = [*(cost.repetitions if cost is not None else ()), round(microseconds, 1)]
            found[key_of(cell)] = Cost(
                *key_of(cell),
                threshold=cell.threshold,
                microseconds=round(float(np.median(every)), 1),
                repetitions=every,
                nfe=round(nfe, 2),
                canvases=batch[cell.task],
            )
            save(list(found.values()))


def _measured(llm: LLM, cell: Cell, task: StudyTask, seed: int, canvases: int) -> tuple[float, float]:
    """Microseconds of a forward in a batch of one cell, and mean forwards of a sample."""
    texts = task.texts(seed, canvases)
    prompts = task.prompts(llm, texts)
    params = [
        msgspec.structs.replace(cell.params(i, task.canvas_of(text)), n=1, trace=False)
        for i, text in enumerate(texts)
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    forwards = sum(output.outputs[0].nfe for output in outputs)
    return 1e6 * seconds / max(1, forwards), forwards / len(texts)


def seconds_of(cells: Iterable[Cell], costs: Iterable[Cost]) -> float:
    """An estimate of the seconds of a run, from the forwards of the measured settings."""
    by_key = {cost.key: cost for cost in costs}
    return (
        sum(
            cell.num_prompts * cell.n * by_key[key_of(cell)].nfe * by_key[key_of(cell)].microseconds
            for cell in cells
        )
        / 1e6
    )


def _canvases_by_task(cells: Iterable[Cell]) -> dict[str, int]:
    """Canvases of a batch of each task: equal ones for all its arms, which are compared by time."""
    found: dict[str, int] = {}
    for cell in cells:
        found[cell.task] = min(BATCH, max(cell.num_prompts, found.get(cell.task, 0)))
    return found


def _middle_of_each_key(cells: Sequence[Cell]) -> list[Cell]:
    """For each key the cell with the middle threshold."""
    by_key: dict[Key, list[Cell]] = {}
    for cell in cells:
        by_key.setdefault(key_of(cell), []).append(cell)
    return [sorted(own, key=lambda cell: cell.threshold or 0.0)[len(own) // 2] for own in by_key.values()]
