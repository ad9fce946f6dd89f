"""The outputs of published decoders on a LLaDA-MoE checkpoint (tests/data/golden), token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from golden_files import GOLDEN, Case, canvas_of, check, check_logits, read

from remask import LLM

CHECKPOINT, FILE = GOLDEN / "lladamoe-tiny", read("lladamoe_decoding")


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    own = case["params"]
    if case["policy"] == "llada":
        return {**canvas_of(case), "unmask": f"schedule:steps={own['steps']}"}
    policy = f"factor:{own['factor']}" if "factor" in own else f"threshold:{own['threshold']}"
    return {**canvas_of(case), "unmask": policy}


CASES = [Case(case, fields_of(case)) for case in FILE["cases"]]


def test_there_are_40_cases() -> None:
    assert len(CASES) == 40


def test_raw_logits_are_those_of_the_published_forward() -> None:
    check_logits(CHECKPOINT, FILE["logits"])


@pytest.mark.parametrize(
    ("max_num_rows", "count"),
    [
        (300, 12),
        pytest.param(1, len(CASES), marks=pytest.mark.slow),
        pytest.param(4096, len(CASES), marks=pytest.mark.slow),
    ],
)
def test_cases_packed_in_any_order_under_any_budget(max_num_rows: int, count: int) -> None:
    cases = random.Random(max_num_rows).sample(CASES, count)
    with LLM(CHECKPOINT, dtype="float32", device="cpu", max_num_rows=max_num_rows) as llm:
        check(llm, cases)


@pytest.mark.slow
def test_a_batch_invariant_engine_writes_the_same_alone_and_packed() -> None:
    with LLM(CHECKPOINT, dtype="float32", device="cpu", batch_invariant=True, max_num_rows=512) as llm:
        check(llm, CASES)
