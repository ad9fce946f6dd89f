"""A policy is two source files and a page. What else lists policies is derived."""

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


PAGE = """# `every_other`: every second slot

## Rule

Commits every second masked slot.

## Parameters

<!-- generate: parameters("every_other") -->
<!-- end -->

## Source

None.

## Example

```python
from remask import LLM

with LLM("tiny") as llm:
    llm.generate("1+1=", {"max_tokens": 8, "unmask": "every_other"})
```

## Differences from the published code

None is published.
"""


def copied(target: Path) -> dict[str, Path]:
    """A copy of the tree, from which `remask` is imported; returns its files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = {name: target / name for name in listed if (ROOT / name).is_file()}
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
    (target / "import").mkdir()
    (target / "import" / "remask").symlink_to(target / "engine")
    for folder in ("scheduler", "workers", "benchmarks"):
        (target / "engine" / folder).symlink_to(target / folder)
    return files


@pytest.mark.slow
def test_a_policy_is_added_in_two_files_and_a_page(tmp_path: Path) -> None:
    files = copied(tmp_path)
    specs = files["scheduler/policies/unmask.py"]
    specs.write_text(specs.read_text() + SPEC)
    (tmp_path / "workers" / "strategies" / "every_other.py").write_text(KERNEL)
    (tmp_path / "docs" / "policies" / "every_other.md").write_text(PAGE)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "import")}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    left, right, at_once = json.loads(run("-c", USE))
    assert left == [1, 2, 1, 3, 1, 2, 1, 4]
    assert right == left[::-1]
    assert at_once == [1] * 8

    run("docs/tools/generate.py")
    changed = [name for name, path in files.items() if path.read_bytes() != (ROOT / name).read_bytes()]
    assert changed == ["docs/policies/index.md", "scheduler/policies/unmask.py"], "the index is generated"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "policy or policies", "tests/docs")
