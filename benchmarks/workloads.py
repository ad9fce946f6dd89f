"""What the throughput benchmark serves: seeded requests, the same on every machine.

Every canvas is filled to its end (`ignore_eos`), so that all decoders do the same work and whole canvases can
be compared; tokens behind an end-of-text token are not counted as visible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from remask import LLM, InvalidRequest, SamplingParams
from remask.benchmarks.tiny.policies import POLICIES, ROOM
from remask.benchmarks.tiny.tasks import PUZZLES, Puzzle
from remask.scheduler.errors import did_you_mean
from remask.workers.models.config import ModelConfig

SEED = 2**31 + 3
PROMPT_LENS = (16, 128)
CANVAS_LENS = (16, 32, 64)
BLOCK_LENS = (8, 16, 32)
FIXED_LEN = 64  # prompt and canvas of the `fixed` workload
TINY_POLICIES = ("threshold 0.9", "factor 1.0", "WINO 0.7/0.9")


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        puzzle: puzzle and text of the prompt where the answer can be judged.
    """

    prompt: list[int]
    params: SamplingParams
    puzzle: tuple[Puzzle, str] | None = None


def mixed(llm: LLM, config: ModelConfig, count: int) -> list[Job]:
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


def fixed(llm: LLM, config: ModelConfig, count: int) -> list[Job]:
    """One length and one policy: what a static batch is made for."""
    rng = np.random.default_rng(SEED)
    params = _params(FIXED_LEN, 32, {"unmask": "threshold:0.9"})
    return [Job(_random_prompt(rng, config, FIXED_LEN), params) for _ in range(count)]


def tiny(llm: LLM, config: ModelConfig, count: int) -> list[Job]:
    """Sudokus and additions under three policies in turn, for the embedded model."""
    if llm.tokenizer is None:
        raise InvalidRequest("workload", "tiny", "is text; give a model with a tokenizer, such as 'tiny'")
    rng = np.random.default_rng(SEED)
    puzzles = list(PUZZLES.values())
    jobs = []
    for i in range(count):
        puzzle = puzzles[i % len(puzzles)]
        (text,), _ = puzzle.held_out(rng, 1)
        canvas_len = puzzle.answer_len + ROOM
        policy = POLICIES[TINY_POLICIES[i // len(puzzles) % len(TINY_POLICIES)]]
        jobs.append(Job(llm.tokenizer.encode(text), _params(canvas_len, canvas_len, policy), (puzzle, text)))
    return jobs


WORKLOADS: dict[str, Callable[[LLM, ModelConfig, int], list[Job]]] = {
    "mixed": mixed,
    "fixed": fixed,
    "tiny": tiny,
}


def workload(name: str, llm: LLM, config: ModelConfig, count: int) -> list[Job]:
    """The first `count` requests of a workload.

    Raises:
        InvalidRequest: no such workload, or none for this model.
    """
    if name not in WORKLOADS:
        raise InvalidRequest("workload", name, f"unknown; {did_you_mean(name, WORKLOADS)}")
    return WORKLOADS[name](llm, config, count)


def _params(canvas_len: int, block_len: int, policy: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=canvas_len, block_length=block_len, seed=0, ignore_eos=True, **policy)


def _random_prompt(rng: np.random.Generator, config: ModelConfig, length: int) -> list[int]:
    special = [config.mask_id, *config.eos_ids, *(() if config.eot_id is None else (config.eot_id,))]
    ids = np.setdiff1d(np.arange(config.vocab_size), special)
    return rng.choice(ids, length).tolist()
