"""Checkpoints of one shape, and what an engine writes with them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from remask import LLM

PROMPTS = [[33, 11, 12], [14, 20, 21, 7], [5], [9, 9]]
SAMPLING: dict[str, Any] = {"max_tokens": 24, "block_length": 8, "temperature": 1.0, "n": 2, "seed": 3}


def tensors_of(directory: Path, version: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, with the entries of each row moved by some places."""
    tensors = load_file(directory / "model.safetensors")
    return {name: own.roll(version, -1) if own.ndim == 2 else own for name, own in tensors.items()}


def write_versions(checkpoint: Path, target: Path, count: int) -> list[Path]:
    """The checkpoint and `count` - 1 others of its shape."""
    directories = [checkpoint]
    for version in range(1, count):
        directories.append(target / str(version))
        shutil.copytree(checkpoint, directories[-1])
        save_file(tensors_of(checkpoint, version), directories[-1] / "model.safetensors")
    return directories


def llm_of(directory: Path, **options: Any) -> LLM:
    return LLM(directory, **{"device": "cpu", "max_num_rows": 512, "batch_invariant": True, **options})


def tokens_of(llm: LLM, **sampling: Any) -> list[Any]:
    outputs = llm.generate(PROMPTS, {**SAMPLING, **sampling}, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def written_by(versions: list[Path]) -> list[Any]:
    """What each version writes."""
    found = []
    for directory in versions:
        with llm_of(directory) as llm:
            found.append(tokens_of(llm))
    assert all(one != other for one, other in itertools.pairwise(found))
    return found
