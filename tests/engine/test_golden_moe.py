"""The outputs of published decoders on a LLaDA-MoE checkpoint (tests/data/golden), token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import GOLDEN, Case, canvas_of, check_logits, check_packed, read

from remask.workers.models.row_ops import triton_ops

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, and the model is on the CPU")
def test_raw_logits_by_the_kernels_are_those_of_the_published_forward() -> None:
    check_logits(CHECKPOINT, FILE["logits"][:1], triton_ops())


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
