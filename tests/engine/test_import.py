"""`import remask` is cheap. tests/test_floors.py checks the import statements of our own modules."""

from __future__ import annotations

import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("code", "never"),
    [
        ("import remask; remask.SamplingParams", {"torch", "ray", "transformers"}),
        ("import remask.cli", {"torch", "ray", "remask.benchmarks"}),
        ("from remask import EngineOptions", {"torch", "ray", "transformers"}),
        pytest.param("from remask import LLM", {"ray"}, marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_loads_no_more_than_it_needs(code: str, never: set[str]) -> None:
    assert not never & modules_after(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import remask

    with pytest.raises(AttributeError, match="LMM"):
        remask.LMM  # noqa: B018
