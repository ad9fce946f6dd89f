"""The outputs of published decoders on a Dream checkpoint (tests/data/golden), token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden_files import GOLDEN, Case, canvas_of, check, check_logits, check_packed, read

from remask import LLM

CHECKPOINT, FILE = GOLDEN / "dream-tiny", read("dream_decoding")
SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def fields_of(case: dict[str, Any]) -> dict[str, Any] | None:
    """Parameters of a case; None: there is no counterpart."""
    own, length = case["params"], case["params"]["gen_length"]
    block = canvas_of(case)
    if case["policy"] == "dream":
        eps = own.get("eps", 1e-3)
        filters = {name: own[name] for name in ("top_p", "top_k") if name in own}
        return {**block, **filters, "unmask": f"dream:steps={own['steps']},alg={own['alg']},eps={eps}"}
    if case["policy"] == "fastdllm_dream":
        return {**block, "unmask": f"threshold:{own['threshold']}"} if own["steps"] == 1 else None
    if "threshold" in own:
        return {**block, "unmask": f"threshold:{own['threshold']}"}
    if "factor" in own:
        return {**block, "unmask": f"factor:f={own['factor']},strict=true"}
    if "gamma" in own:
        return {**block, "unmask": f"entropy_bound:g={own['gamma']},order=entropy"}
    steps = length // own["block_length"] * -(-own["block_length"] // own["num_transfer_tokens"])
    return {**block, "unmask": f"schedule:steps={steps},score={SCORES[own['alg']]}"}


CASES = [Case(case, fields) for case in FILE["cases"] if (fields := fields_of(case)) is not None]


@pytest.fixture(scope="module")
def dream_llm() -> Iterator[LLM]:
    with LLM(CHECKPOINT, dtype="float32", device="cpu", max_num_rows=4096) as llm:
        yield llm


def test_there_are_49_cases_with_a_counterpart() -> None:
    assert len(CASES) == 49


def test_raw_logits_are_those_of_the_published_forward() -> None:
    check_logits(CHECKPOINT, FILE["logits"])


@pytest.mark.slow
def test_cases_alone(dream_llm: LLM) -> None:
    for case in CASES:
        check(dream_llm, [case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_the_same() -> None:
    check_packed(CHECKPOINT, CASES, max_num_rows=512, device="cuda")


def test_some_cases_packed_in_another_order() -> None:
    check_packed(CHECKPOINT, CASES[::4], max_num_rows=300)


@pytest.mark.slow
@pytest.mark.parametrize("max_num_rows", [1, 300, 4096])
def test_all_cases_in_another_order_under_any_budget(max_num_rows: int) -> None:
    check_packed(CHECKPOINT, CASES, max_num_rows)


@pytest.mark.slow
def test_a_batch_invariant_engine_writes_the_same_alone_and_packed() -> None:
    check_packed(CHECKPOINT, CASES, max_num_rows=512, batch_invariant=True)
