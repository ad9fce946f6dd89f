"""The outputs of published decoders on Dream and LLaDA-MoE (tests/data/golden), token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from golden_files import GOLDEN, Case, canvas_of, check, check_logits, check_packed, read

from remask import LLM
from remask.workers.models.row_ops import triton_ops

SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def dream_fields(case: dict[str, Any]) -> dict[str, Any] | None:
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


def moe_fields(case: dict[str, Any]) -> dict[str, Any]:
    own = case["params"]
    if case["policy"] == "llada":
        return {**canvas_of(case), "unmask": f"schedule:steps={own['steps']}"}
    policy = f"factor:{own['factor']}" if "factor" in own else f"threshold:{own['threshold']}"
    return {**canvas_of(case), "unmask": policy}


class Published(NamedTuple):
    """What was published on a checkpoint: raw logits, and the cases that have a counterpart."""

    checkpoint: Path
    logits: list[dict[str, Any]]
    cases: list[Case]


def published(
    checkpoint: str, file: str, fields: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> Published:
    content = read(file)
    cases = [Case(case, own) for case in content["cases"] if (own := fields(case)) is not None]
    return Published(GOLDEN / checkpoint, content["logits"], cases)


DREAM = published("dream-tiny", "dream_decoding", dream_fields)
MOE = published("lladamoe-tiny", "lladamoe_decoding", moe_fields)
of_each_family = pytest.mark.parametrize("family", [DREAM, MOE], ids=["dream", "moe"])


def test_there_are_49_and_40_cases_with_a_counterpart() -> None:
    assert (len(DREAM.cases), len(MOE.cases)) == (49, 40)


@of_each_family
def test_raw_logits_are_those_of_the_published_forward(family: Published) -> None:
    check_logits(family.checkpoint, family.logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, and the model is on the CPU")
def test_raw_logits_by_the_kernels_are_those_of_the_published_forward() -> None:
    check_logits(MOE.checkpoint, MOE.logits[:1], triton_ops())


@pytest.mark.slow
@of_each_family
def test_cases_alone(family: Published) -> None:
    with LLM(family.checkpoint, dtype="float32", device="cpu", max_num_rows=4096) as llm:
        for case in family.cases:
            check(llm, [case])


@of_each_family
def test_some_cases_packed_in_another_order(family: Published) -> None:
    check_packed(family.checkpoint, family.cases[::4], max_num_rows=300)


@pytest.mark.slow
@pytest.mark.parametrize("max_num_rows", [1, 300, 4096])
@of_each_family
def test_all_cases_in_another_order_under_any_budget(family: Published, max_num_rows: int) -> None:
    check_packed(family.checkpoint, family.cases, max_num_rows)


@pytest.mark.slow
@of_each_family
def test_a_batch_invariant_engine_writes_the_same_packed(family: Published) -> None:
    check_packed(family.checkpoint, family.cases, max_num_rows=512, batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@of_each_family
def test_a_gpu_writes_the_same(family: Published) -> None:
    check_packed(family.checkpoint, family.cases, max_num_rows=512, device="cuda")
