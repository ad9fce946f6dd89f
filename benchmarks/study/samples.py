"""The row of a sample: its setting, its answer, its cost and what its remaskings did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow

from remask import CompletionOutput, RequestOutput, Trace
from remask.benchmarks.study.grid import Cell
from remask.benchmarks.study.sandbox import CheckFailed
from remask.benchmarks.study.tasks import StudyTask

SETTINGS = {
    "cell": pyarrow.string(),
    "task": pyarrow.string(),
    "arm": pyarrow.string(),
    "unmask": pyarrow.string(),
    "remask": pyarrow.string(),
    "threshold": pyarrow.float64(),
    "block_length": pyarrow.int32(),  # null: the whole canvas
    "temperature": pyarrow.float64(),
    "rank": pyarrow.string(),
    "repetition": pyarrow.int32(),  # the seed of the cell
}
SCHEMA = pyarrow.schema(
    {
        **SETTINGS,
        "prompt": pyarrow.int32(),
        "sample": pyarrow.int32(),
        "seed": pyarrow.int64(),  # of the request
        "text": pyarrow.string(),
        "score": pyarrow.float64(),  # of puzzles 1 or 0; null: the request or the checker failed
        "error": pyarrow.string(),
        "nfe": pyarrow.int32(),
        "num_query_rows": pyarrow.int64(),
        "num_query_key_pairs": pyarrow.int64(),  # a row of a forward sees prompt and canvas
        "num_visible_tokens": pyarrow.int32(),
        "num_commits": pyarrow.int32(),
        "num_non_top": pyarrow.int32(),  # commits of another token than the most probable one
        "num_remasks": pyarrow.int32(),
        "num_refills": pyarrow.int32(),  # commits to a position that was remasked before
        "num_flip_flops": pyarrow.int32(),  # refills with the token that was removed
        "num_repairs": pyarrow.int32(),  # refills from a wrong token to a right one
        "num_damages": pyarrow.int32(),  # refills from a right token to a wrong one
        "commit_steps": pyarrow.list_(pyarrow.int16()),  # the forward of the last commit of each position
    }
)


def setting_of(cell: Cell) -> dict[str, Any]:
    """The columns of `SETTINGS`."""
    return {
        "cell": cell.name,
        "task": cell.task,
        "arm": cell.arm,
        "unmask": cell.unmask,
        "remask": cell.remask,
        "threshold": cell.threshold,
        "block_length": cell.block_length,
        "temperature": cell.temperature,
        "rank": cell.rank,
        "repetition": cell.seed,
    }


def rows_of(
    cell: Cell,
    task: StudyTask,
    prompt: int,
    text: str,
    output: RequestOutput,
    answers: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """A row for each sample of a request.

    Args:
        cell: the setting.
        task: its task.
        prompt: number of the prompt.
        text: the prompt.
        output: what the engine returned.
        answers: token ids of the prompt's right answers; empty if they are unknown.
    """
    rows = []
    for sample in output.outputs:
        assert sample.trace is not None, "the study traces every sample"
        num_keys = len(output.prompt_token_ids) + sample.trace.canvas_len
        score, error = _judged(task, text, sample, output.error)
        rows.append(
            {
                **setting_of(cell),
                "prompt": prompt,
                "sample": sample.index,
                "seed": sample.seed,
                "text": sample.text,
                "score": score,
                "error": error,
                "nfe": sample.nfe,
                "num_query_rows": sample.num_query_rows,
                "num_query_key_pairs": sample.num_query_rows * num_keys,
                "num_visible_tokens": sample.num_visible_tokens,
                **revisions(sample, answers),
            }
        )
    return rows


def _judged(
    task: StudyTask, prompt: str, sample: CompletionOutput, error: str | None
) -> tuple[float | None, str | None]:
    """The score of a sample, or the error of its request or of its checker."""
    if error is not None:
        return None, error
    try:
        return task.score(prompt, sample.text or ""), None
    except CheckFailed as failure:
        return None, f"checker: {failure}"


def revisions(sample: CompletionOutput, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts over the trace of a sample. Tokens are right if they agree with the right answer that is nearest
    to the sample's own."""
    trace = sample.trace
    assert trace is not None, "the study traces every sample"
    right = _nearest(trace, answers)
    removed: dict[int, int] = {}
    counts = dict.fromkeys(("num_refills", "num_flip_flops", "num_repairs", "num_damages"), 0)
    commit_steps = [0] * trace.canvas_len
    for step, position, token, is_commit in zip(
        trace.step, trace.position, trace.token, trace.is_commit, strict=True
    ):
        if not is_commit:
            removed[position] = token
            continue
        commit_steps[position] = step
        if position not in removed:
            continue
        before = removed.pop(position)
        counts["num_refills"] += 1
        counts["num_flip_flops"] += before == token
        if position in right:
            counts["num_repairs"] += before != right[position] == token
            counts["num_damages"] += before == right[position] != token
    num_commits = sum(trace.is_commit)
    return {
        "num_commits": num_commits,
        "num_non_top": num_commits - sum(trace.is_top),
        "num_remasks": len(trace.is_commit) - num_commits,
        **counts,
        "commit_steps": commit_steps,
    }


def _nearest(trace: Trace, answers: Sequence[Sequence[int]]) -> dict[int, int]:
    """Tokens by position of the answer that agrees with the final canvas in most positions."""
    if not answers:
        return {}
    final = np.full(trace.canvas_len, -1)
    for position, token, is_commit in zip(trace.position, trace.token, trace.is_commit, strict=True):
        final[position] = token if is_commit else -1
    best = max(answers, key=lambda answer: int((final[: len(answer)] == np.array(answer)).sum()))
    return dict(enumerate(best))
