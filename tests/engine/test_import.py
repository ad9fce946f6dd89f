"""`import remask` is cheap, and the floors keep to themselves."""

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
        ("import remask.scheduler.scheduler", {"torch", "ray", "transformers", "remask.workers"}),
        ("import remask.workers.executor", {"ray", "transformers", "remask.llm", "remask.engine"}),
        ("import remask.cli", {"torch", "ray", "remask.benchmarks"}),
        ("from remask import EngineOptions", {"torch", "ray", "transformers"}),
        ("from remask import LLM", {"ray"}),
    ],
)
def test_a_floor_imports_nothing_from_above(code: str, never: set[str]) -> None:
    assert not never & modules_after(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import remask

    with pytest.raises(AttributeError, match="LMM"):
        remask.LMM  # noqa: B018
