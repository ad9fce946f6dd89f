"""The exactness benchmark: its figures against the chain, and its command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from remask import LLM
from remask.benchmarks import exactness
from remask.workers.models.markov import write_markov


def test_the_figures_of_the_chain_itself_are_nearly_exact() -> None:
    p = exactness.chain_distribution()
    assert p.sum() == pytest.approx(1)
    found = exactness.sampled_chain(10_000_000)
    assert found["distance"] < 0.01
    assert found["entropy_bits"] == pytest.approx(float(-(p * np.log2(p)).sum()), abs=0.01)


def test_counts_stand_in_the_order_of_the_distribution() -> None:
    surest = (exactness.START,) * exactness.CANVAS_LEN
    counts = exactness.counts_of([surest, surest, (1,) * exactness.CANVAS_LEN])
    assert counts[exactness.chain_distribution().argmax()] == 2
    assert counts.tolist()[-1] == 1
    assert counts.sum() == 3


def test_a_policy_that_commits_together_is_further_away(tmp_path: Path) -> None:
    write_markov(tmp_path, exactness.INITIAL, exactness.TRANSITION)
    with LLM(tmp_path) as llm:
        exact, bold = (
            exactness.measure(llm, policy, 10, 1.0, 2048)
            for policy in ("one token a step", "two tokens a step")
        )
    assert exact["nfe"] == 10
    assert bold["nfe"] == 5
    assert exact["distance"] < 0.2 < 0.35 < bold["distance"]


def test_the_command_refuses_a_count_it_cannot_draw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["exactness", "--count", "1000"])
    with pytest.raises(SystemExit, match="2"):
        exactness.main()
    assert "--count must be a multiple of 1024" in capsys.readouterr().err
