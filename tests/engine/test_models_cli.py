"""`remask models`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

Command = Callable[..., subprocess.CompletedProcess[str]]
GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_the_families_are_listed(remask: Command) -> None:
    lines = [line.split() for line in remask("models").stdout.splitlines()]
    assert ["LLaDAModelLM", "LLaDA"] in lines
    assert ["DreamModel", "Dream"] in lines
    assert ["LLaDAMoEModelLM", "LLaDA-MoE"] in lines


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llada-tiny", ["family LLaDA", "tokenizer none: prompts must be token ids"]),
        ("dream-tiny", ["family Dream", "parameters 425,440 in", "6 heads on 2 key heads", "151; 143"]),
        ("lladamoe-tiny", ["family LLaDA-MoE", "parameters 368,160 in", "experts 3 of 16, of size 32"]),
    ],
)
def test_a_checkpoint_is_checked(remask: Command, name: str, said: list[str]) -> None:
    run = remask("models", GOLDEN / name)
    assert run.returncode == 0, run.stderr
    text = " ".join(run.stdout.split())
    assert all(part in text for part in said), text


def test_the_tokenizer_and_its_template_are_told(remask: Command) -> None:
    text = " ".join(remask("models", "tiny").stdout.split())
    assert "chat template yes" in text
    assert "longest sequence" in text


def test_what_is_missing_is_listed(remask: Command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "dream-tiny", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    run = remask("models", folder)
    assert run.returncode == 2
    assert "missing tensors: model.layers.2.self_attn.k_proj.bias" in run.stderr
