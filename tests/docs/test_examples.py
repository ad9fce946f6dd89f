"""The examples run."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """What the last lines of each example start."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_example_of_rollouts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "rollouts.py"))["main"](rounds=2, num_puzzles=4)
    (first, second) = capsys.readouterr().out.splitlines()
    assert first.startswith("weights 0: ")
    assert second.startswith("weights 1: ")
    for line in (first, second):
        (gap,) = re.findall("within (.*) of the trainer's", line)
        assert float(gap) < 1e-3, "the engine runs on the weights that the trainer has"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("ray_*.py")))
def test_an_example_on_ray_runs(cluster: None, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"]()
    printed = capsys.readouterr().out
    assert " 0 refused" in printed
    assert " 0 of " not in printed
