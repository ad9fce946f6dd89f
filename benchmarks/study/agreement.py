"""How often shadow rows and exact leave-one-out probabilities doubt the same tokens.

WINO decodes the prompts of the exact arm's cells greedily, with the published rules (`PlainCanvas`). Before
each step every committed token of the block has its probability from its shadow row and, in a copy of the
canvas without it, the exact one. A token is doubted if its probability is below t2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from remask.benchmarks.plain_canvas import PlainCanvas
from remask.benchmarks.plain_loop import forward
from remask.benchmarks.study.grid import Cell
from remask.scheduler.params import resolve
from remask.scheduler.policies import CappedThreshold, Factor, OracleLoo, Schedule, Threshold, Wino
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.rows.pack import PackedRows

Row = dict[str, Any]
PLAIN_RULES = CappedThreshold | Factor | Schedule | Threshold  # those of `PlainCanvas`


def exact_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose prompts are replayed: greedy, with the exact verifier and a rule of `PlainCanvas`."""
    return [
        cell
        for cell in cells
        if cell.temperature == 0
        and isinstance(resolve(cell.params(0)).remask, OracleLoo)
        and isinstance(resolve(cell.params(0)).unmask, PLAIN_RULES)
    ]


def measure(
    model: TransformerDenoiser,
    wanted: Sequence[Cell],
    prompts_of: Callable[[Cell], list[list[int]]],
    done: list[Row],
    save: Callable[[list[Row]], None],
    progress: Callable[[int, int], None],
) -> None:
    """Measures the cells that have not been measured yet.

    Args:
        model: in fp32.
        wanted: what `exact_cells` returns.
        prompts_of: token ids of a cell's prompts.
        done: rows of the first cells, one for each prompt; those of later cells are appended.
        save: called with the rows after each cell.
        progress: called with the cells done and all.
    """
    measured = {row["cell"] for row in done}
    for number, cell in enumerate(wanted):
        if cell.name not in measured:
            for index, prompt in enumerate(prompts_of(cell)):
                done.append({**_setting(cell), "prompt": index, **_compared(model, cell, prompt)})
            save(done)
        progress(number + 1, len(wanted))


def _setting(cell: Cell) -> Row:
    return {
        "cell": cell.name,
        "task": cell.task,
        "threshold": cell.threshold,
        "block_length": cell.block_length,
    }


@torch.inference_mode()
def _compared(model: TransformerDenoiser, cell: Cell, prompt: list[int]) -> Row:
    """Decisions about one canvas: how many, and how many were doubts of each kind."""
    exact = resolve(cell.params(0)).remask
    assert isinstance(exact, OracleLoo)
    params = msgspec.structs.replace(
        cell.params(0), remask=Wino(exact.t2, budget=exact.budget), ignore_eos=True, trace=False
    )
    canvas, count, distance = PlainCanvas(prompt, params, model.mask_id), Counter[tuple[bool, bool]](), 0.0
    while not canvas.finished:
        proposal, confidence, given = forward(model, canvas)
        shadow = given[len(canvas.ids) :]
        committed = (~canvas.masked).nonzero()[0]
        loo = leave_one_out(model, canvas.ids, canvas.start + committed)
        count.update(zip((shadow[committed] < exact.t2).tolist(), (loo < exact.t2).tolist(), strict=True))
        distance += float(np.abs(shadow[committed] - loo).sum())
        own = slice(canvas.start, canvas.end)
        canvas.step(proposal[own], confidence[own], shadow)
    return {
        "num_decisions": count.total(),
        "num_doubted_by_both": count[True, True],
        "num_doubted_by_shadows": count[True, False],
        "num_doubted_exactly": count[False, True],
        "sum_of_distances": distance,
    }


def leave_one_out(
    model: TransformerDenoiser, ids: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The exact probabilities of some tokens of a canvas, each in a copy in which it is masked."""
    count, length = len(positions), len(ids)
    if not count:
        return np.zeros(0)
    copies = torch.from_numpy(ids).repeat(count, 1)
    places = torch.from_numpy(positions)
    copies[torch.arange(count), places] = model.mask_id
    bounds = tuple(range(0, count * length + 1, length))
    candidates = torch.arange(count) * length + places - model.config.shift
    rows = PackedRows(
        ids_T=copies.flatten(),
        positions_T=torch.arange(length).repeat(count),
        layout=VarlenLayout(bounds, bounds, ()),
        candidates_H=candidates,
        candidate_layout=VarlenLayout(tuple(range(count + 1)), bounds, ()),
        slots_N=candidates,
        num_main_slots=count,
    )
    logits = model.model.logits(model.model(rows, SdpaAttention()))
    given = torch.from_numpy(ids)[places]
    return logits.double().softmax(-1).gather(1, given.unsqueeze(1)).squeeze(1).numpy()
