"""A policy is two source files: its spec's and its kernel's. Nothing else lists policies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SPEC = '''
__all__ += ["EveryOther"]


class EveryOther(UnmaskPolicy, frozen=True, tag="every_other"):
    """Every second masked position, from the left or from the right."""

    side: Literal["left", "right"] = "left"
'''

KERNEL = '''
"""Every second masked position."""

import torch

from remask.workers.strategies.view import BlockView, Params


def every_other(view: BlockView, params: Params) -> torch.Tensor:
    masked = view.masked if params["side"] == "left" else view.masked.flip(1)
    chosen = masked & (masked.cumsum(1) % 2 == 1)
    return chosen if params["side"] == "left" else chosen.flip(1)
'''

USE = """
import json
from remask import LLM, EveryOther, SamplingParams

with LLM("tiny", device="cpu", dtype="float32", max_num_rows=256) as llm:
    asked = [SamplingParams(max_tokens=8, unmask=policy, ignore_eos=True)
             for policy in (EveryOther(), "every_other:right", "threshold:0")]
    outputs = llm.generate([[5, 6, 7]] * 3, asked, use_tqdm=False)
print(json.dumps([output.outputs[0].commit_steps for output in outputs]))
"""


@pytest.mark.slow
def test_a_policy_is_added_in_two_files(tmp_path: Path) -> None:
    package = tmp_path / "remask"
    shutil.copytree(ROOT / "engine", package)
    for folder in ("scheduler", "workers"):
        shutil.copytree(ROOT / folder, package / folder)
    specs = package / "scheduler" / "policies" / "unmask.py"
    specs.write_text(specs.read_text() + SPEC)
    (package / "workers" / "strategies" / "every_other.py").write_text(KERNEL)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    left, right, at_once = json.loads(ended.stdout)
    assert left == [1, 2, 1, 3, 1, 2, 1, 4]
    assert right == left[::-1]
    assert at_once == [1] * 8
