"""What benchmarks serve: seeded requests, the same on every machine.

Canvases are filled to their end (`ignore_eos`), so that all decoders do the same work and whole canvases can
be compared; tokens behind an end-of-text token are not counted as visible. Only `answers` lets texts end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from remask import InvalidRequest, SamplingParams
from remask.benchmarks.tiny.policies import POLICIES, ROOM
from remask.benchmarks.tiny.tasks import PUZZLES, Puzzle
from remask.scheduler.errors import did_you_mean
from remask.text import PromptEncoder
from remask.workers.models.config import ModelConfig

logger = logging.getLogger(__name__)

Tokenizer: TypeAlias = PreTrainedTokenizerBase | None

SEED = 2**31 + 3
PROMPT_LENS = (16, 128)
CANVAS_LENS = (16, 32, 64)
BLOCK_LENS = (8, 16, 32)
CANVAS_STEP = 8  # that canvases of files are rounded up to
FIXED_LEN = 64  # prompt and canvas of the `fixed` workload
MAX_SHOWN = 5  # rows of a file that a warning names
TINY_POLICIES = ("threshold 0.9", "factor 1.0", "WINO 0.7/0.9")


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        text: of the prompt; None: the prompt was given as ids.
        puzzle: judges the answer; None: the answer cannot be judged.
    """

    prompt: list[int]
    params: SamplingParams
    text: str | None = None
    puzzle: Puzzle | None = None


def mixed(tokenizer: Tokenizer, config: ModelConfig, count: int) -> list[Job]:
    """Prompts, canvases and blocks of many lengths under three policies in turn."""
    rng = np.random.default_rng(SEED)
    jobs = []
    for i in range(count):
        canvas_len = int(rng.choice(CANVAS_LENS))
        policy: dict[str, Any] = (
            {"unmask": "threshold:0.9"},
            {"unmask": "capped_threshold:0.6", "remask": "wino:0.9"},
            {"unmask": f"schedule:{canvas_len // 2}"},
        )[i % 3]
        block_len = min(int(rng.choice(BLOCK_LENS)), canvas_len)
        prompt = _random_prompt(rng, config, int(rng.integers(PROMPT_LENS[0], PROMPT_LENS[1] + 1)))
        jobs.append(Job(prompt, _params(canvas_len, block_len, policy)))
    return jobs


def fixed(tokenizer: Tokenizer, config: ModelConfig, count: int) -> list[Job]:
    """One length and one policy: what a static batch is made for."""
    rng = np.random.default_rng(SEED)
    params = _params(FIXED_LEN, 32, {"unmask": "threshold:0.9"})
    return [Job(_random_prompt(rng, config, FIXED_LEN), params) for _ in range(count)]


def tiny(tokenizer: Tokenizer, config: ModelConfig, count: int) -> list[Job]:
    """Sudokus and additions under three policies in turn, for the embedded model."""
    rng = np.random.default_rng(SEED)
    jobs = []
    for i in range(count):
        policy = TINY_POLICIES[i // len(PUZZLES) % len(TINY_POLICIES)]
        jobs.append(_puzzle_job(tokenizer, rng, i, POLICIES[policy], ignore_eos=True))
    return jobs


def answers(tokenizer: Tokenizer, count: int, policy: dict[str, Any], seed: int = SEED) -> list[Job]:
    """Sudokus and additions under one policy, whose texts end where their answers do."""
    rng = np.random.default_rng(seed)
    return [_puzzle_job(tokenizer, rng, i, policy, ignore_eos=False) for i in range(count)]


def _puzzle_job(
    tokenizer: Tokenizer, rng: np.random.Generator, place: int, policy: dict[str, Any], *, ignore_eos: bool
) -> Job:
    if tokenizer is None:
        raise InvalidRequest("workload", "tiny", "is text; give a model with a tokenizer, such as 'tiny'")
    puzzle = list(PUZZLES.values())[place % len(PUZZLES)]
    (text,), _ = puzzle.held_out(rng, 1)
    canvas_len = puzzle.answer_len + ROOM
    params = _params(canvas_len, canvas_len, policy, ignore_eos)
    return Job(tokenizer.encode(text), params, text, puzzle)


def sharegpt(tokenizer: Tokenizer, config: ModelConfig, count: int, path: Path) -> list[Job]:
    """First turns of a file of conversations in ShareGPT's format, with canvases as long as their answers.

    Rows that are no conversation, or do not fit the model, are skipped; a warning counts them and names the
    first. If fewer than `count` fit, they repeat.

    Raises:
        InvalidRequest: the file cannot be read, is no such file, or holds nothing that fits.
    """
    name = f"sharegpt:{path}"
    if tokenizer is None:
        raise InvalidRequest("workload", name, "is text; give a model with a tokenizer")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest("workload", name, f"cannot be read: {error}") from None
    if not isinstance(rows, list):
        fix = "is not a list of objects with `conversations`, lists of objects with `from` and `value`"
        raise InvalidRequest("workload", name, fix)
    jobs: list[Job] = []
    skipped: list[str] = []
    num_read = 0
    for row in rows:
        if len(jobs) == count:
            break
        num_read += 1
        try:
            jobs.append(_conversation_job(tokenizer, config, row))
        except ValueError as error:
            skipped.append(f"row {num_read} {error}")
    summary = f"{len(skipped)} of {num_read} rows skipped: {'; '.join(skipped[:MAX_SHOWN])}"
    summary += "; ..." if len(skipped) > MAX_SHOWN else ""
    if not jobs:
        problem = (
            f"holds no conversation of {config.max_len} tokens or less; {summary}"
            if rows
            else "holds no rows"
        )
        raise InvalidRequest("workload", name, problem)
    if skipped:
        logger.warning("%s: %s", name, summary)
    return list(islice(cycle(jobs), count))


def _conversation_job(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, row: Any) -> Job:
    """The first turn of a row of a ShareGPT file; raises ValueError with the reason if it has none."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("has no `conversations` of two turns")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("has a turn without a text `value`")
    encoder = PromptEncoder(tokenizer, config.mask_id)
    prompt, answer = (encoder.encode(text, add_special_tokens=True) for text in texts)
    canvas_len = -(-len(answer) // CANVAS_STEP) * CANVAS_STEP
    if not 0 < canvas_len <= config.max_len - len(prompt):
        raise ValueError(f"takes {len(prompt)} + {canvas_len} tokens")
    params = _params(canvas_len, min(32, canvas_len), {"unmask": "threshold:0.9"})
    return Job(prompt, params, texts[0])


WORKLOADS: dict[str, Callable[[Tokenizer, ModelConfig, int], list[Job]]] = {
    "mixed": mixed,
    "fixed": fixed,
    "tiny": tiny,
}


def workload(name: str, tokenizer: Tokenizer, config: ModelConfig, count: int) -> list[Job]:
    """The first `count` requests of a workload.

    Raises:
        InvalidRequest: no such workload, or none for this model; or its file is invalid.
    """
    kind, _, argument = name.partition(":")
    if kind == "sharegpt":
        if not argument:
            raise InvalidRequest("workload", name, "needs its file: sharegpt:FILE.json")
        return sharegpt(tokenizer, config, count, Path(argument))
    if name not in WORKLOADS:
        raise InvalidRequest(
            "workload", name, f"unknown; {did_you_mean(name, [*WORKLOADS, 'sharegpt:FILE.json'])}"
        )
    return WORKLOADS[name](tokenizer, config, count)


def _params(
    canvas_len: int, block_len: int, policy: dict[str, Any], ignore_eos: bool = True
) -> SamplingParams:
    return SamplingParams(
        max_tokens=canvas_len, block_length=block_len, seed=0, ignore_eos=ignore_eos, **policy
    )


def _random_prompt(rng: np.random.Generator, config: ModelConfig, length: int) -> list[int]:
    special = [config.mask_id, *config.eos_ids, *(() if config.eot_id is None else (config.eot_id,))]
    ids = np.setdiff1d(np.arange(config.vocab_size), special)
    return rng.choice(ids, length).tolist()
