"""The entry point group `remask.strategies`: the package of the page on custom policies, and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "policies" / "custom.md"


def install(source: Path, target: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--target", str(target), str(source)),
        ],
        check=True,
    )


def environment(target: Path) -> dict[str, str]:
    """That of a process which finds what is installed in `target`."""
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`remask` in a process of its own."""
    code = "import sys; from remask.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(target)
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, with two more entry points: one of nothing, one of a name that is taken."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    text = PAGE.read_text()
    module = re.search(r"```python file=remask_coin\.py\n(.*?)```", text, re.S)
    project = re.search(r"```toml file=pyproject\.toml\n(.*?)```", text, re.S)
    assert module is not None
    assert project is not None
    assert len(module.group(1).splitlines()) <= 30, "the page promises so many lines"
    (source / "remask_coin.py").write_text(module.group(1))
    more = 'gone = "remask_coin:Gone"\nwino = "remask_coin:Coin"\n'
    (source / "pyproject.toml").write_text(
        project.group(1).replace('coin = "remask_coin:Coin"\n', f'coin = "remask_coin:Coin"\n{more}')
    )
    install(source, target)
    return target


def test_the_pages_policy_decodes_beside_the_others(installed: Path) -> None:
    ask = ["generate", "--model", "tiny", "--json", "--seed", "3", "--max-tokens", "8", "--trace", "12+34="]
    told = {}
    for p in ("1.0", "0.0"):
        done = run(installed, *ask, "--unmask", f"coin:{p}", "--remask", "wino")
        assert done.returncode == 0, done.stderr
        told[p] = json.loads(done.stdout)["outputs"][0]
    assert told["1.0"]["trace"]["step"].count(1) == 8, "everything in the first step"
    assert max(told["0.0"]["trace"]["step"]) == told["0.0"]["nfe"] == 8, "one token a step"


def test_its_parameters_are_checked_like_any(installed: Path) -> None:
    done = run(installed, "generate", "--unmask", "coin:p=2", "x")
    assert done.returncode == 2
    assert "unmask.p" in done.stderr
    done = run(installed, "generate", "--unmask", "coyn", "x")
    assert "did you mean 'coin'?" in done.stderr


def test_a_policy_that_cannot_be_loaded_harms_no_other_and_says_why(installed: Path) -> None:
    done = run(installed, "generate", "--unmask", "gone", "x")
    assert done.returncode == 2
    told = "the package that brings it cannot be used: entry point gone = remask_coin:Gone of remask-coin: "
    assert f"unmask: {told}AttributeError" in done.stderr
    done = run(installed, "generate", "--json", "--max-tokens", "4", "--remask", "wino", "1+2=")
    assert done.returncode == 0, "remask's own policy keeps its name"


def test_it_travels_like_any(installed: Path) -> None:
    code = """
import msgspec
from remask_coin import Coin
from remask import SamplingParams
from remask.scheduler.canvas import CanvasSpec, new_canvas
from remask.scheduler.params import resolve
spec = new_canvas("r", 0, [5], resolve(SamplingParams(unmask=Coin(0.25))), seed=0, sample=0, mask_id=0,
                  stop_ids=[]).spec
assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=CanvasSpec) == spec
assert spec.unmask == Coin(0.25)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(installed))
