"""The entry point group `remask.strategies`: the package of the page on custom policies, and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "policies" / "custom.md"


# One process for all commands: it imports the packages and torch once.
COMMANDS = """
import contextlib, io, json, sys
from remask.cli import main
answers = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err, status = ["remask", *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
    answers.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""
TRAVELS = """
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
DECODE = "generate --model tiny --json --seed 3 --max-tokens 8 --trace 12+34= --remask wino --unmask"
ASKED = [
    f"{DECODE} coin:1.0",
    f"{DECODE} coin:0.0",
    "generate --unmask coin:p=2 x",
    "generate --unmask coyn x",
    "generate --unmask gone x",
    "generate --json --max-tokens 4 --remask wino 1+2=",
]


def install(source: Path, target: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--target", str(target), str(source)),
        ],
        check=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package with two more entry points: one of a missing object, one of a taken name."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    text = PAGE.read_text()
    module = re.search(r"```python file=remask_coin\.py\n(.*?)```", text, re.S)
    project = re.search(r"```toml file=pyproject\.toml\n(.*?)```", text, re.S)
    assert module is not None
    assert project is not None
    assert len(module.group(1).splitlines()) <= 30, "the page promises at most 30 lines"
    (source / "remask_coin.py").write_text(module.group(1))
    more = 'gone = "remask_coin:Gone"\nwino = "remask_coin:Coin"\n'
    (source / "pyproject.toml").write_text(
        project.group(1).replace('coin = "remask_coin:Coin"\n', f'coin = "remask_coin:Coin"\n{more}')
    )
    install(source, target)
    return target


def python(target: Path, code: str, stdin: str = "") -> str:
    """The output of a process that can import the packages in `target`."""
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answers(installed: Path) -> dict[str, tuple[int, str, str]]:
    """Status, output and errors of each command."""
    asked = json.dumps([command.split() for command in ASKED])
    return dict(zip(ASKED, json.loads(python(installed, COMMANDS, asked)), strict=True))


def test_the_pages_policy_decodes_beside_the_others(answers: dict[str, tuple[int, str, str]]) -> None:
    samples = {}
    for p in ("1.0", "0.0"):
        status, out, err = answers[f"{DECODE} coin:{p}"]
        assert status == 0, err
        samples[p] = json.loads(out)["outputs"][0]
    assert samples["1.0"]["trace"]["step"].count(1) == 8, "everything in the first step"
    assert max(samples["0.0"]["trace"]["step"]) == samples["0.0"]["nfe"] == 8, "one token a step"


def test_a_packages_parameters_are_checked_like_any(answers: dict[str, tuple[int, str, str]]) -> None:
    status, _, err = answers["generate --unmask coin:p=2 x"]
    assert (status, "unmask.p" in err) == (2, True)
    assert "did you mean 'coin'?" in answers["generate --unmask coyn x"][2]


def test_a_policy_that_cannot_be_loaded_harms_no_other_and_says_why(
    answers: dict[str, tuple[int, str, str]],
) -> None:
    status, _, err = answers["generate --unmask gone x"]
    assert status == 2
    problem = "the package that brings it cannot be used: entry point gone = remask_coin:Gone of remask-coin"
    assert f"unmask: {problem}: AttributeError" in err
    status, _, err = answers["generate --json --max-tokens 4 --remask wino 1+2="]
    assert status == 0, f"remask's own policy keeps its name: {err}"


def test_a_packages_policy_survives_the_wire(installed: Path) -> None:
    python(installed, TRAVELS)
