"""The outputs of published decoders on a Dream checkpoint (tests/data/golden), token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import logits_of

from remask import LLM, SamplingParams
from remask.workers.models.denoiser import load_denoiser

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CHECKPOINT = GOLDEN / "dream-tiny"
FILE: dict[str, Any] = json.loads((GOLDEN / "dream_decoding.json").read_text())
SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}

Case = dict[str, Any]


def fields_of(case: Case) -> dict[str, Any] | None:
    """Parameters of a case; None: there is no counterpart."""
    own, length = case["params"], case["params"]["gen_length"]
    block = {"max_tokens": length, "block_length": own.get("block_length", length), "ignore_eos": True}
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


CASES = [(case, fields) for case in FILE["cases"] if (fields := fields_of(case)) is not None]


@pytest.fixture(scope="module")
def dream_llm() -> Iterator[LLM]:
    with LLM(CHECKPOINT, dtype="float32", device="cpu", max_num_rows=4096) as llm:
        yield llm


def check(llm: LLM, cases: list[tuple[Case, dict[str, Any]]]) -> None:
    """Some prompts hold the mask id, which the intake refuses and the engine keeps."""
    intake, requests = llm.engine.intake, []
    for case, fields in cases:
        prompt = [1 if token == FILE["mask_token_id"] else token for token in case["prompt"]]
        checked = intake.check(prompt, SamplingParams(**fields))
        requests.append(intake.request(checked._replace(ids=case["prompt"])))
    outputs = {output.request_id: output for output in llm.engine.serve(requests)}
    for (case, _), request in zip(cases, requests, strict=True):
        sample = outputs[request.request_id].outputs[0]
        needed = case.get("nfe_needed", case["nfe"])
        assert (sample.token_ids, sample.nfe) == (case["output"], needed), (case["policy"], case["params"])


def test_there_are_49_cases_with_a_counterpart() -> None:
    assert len(CASES) == 49


def test_raw_logits_are_those_of_the_published_forward() -> None:
    model = load_denoiser(CHECKPOINT, dtype="float32", device="cpu")
    for entry in FILE["logits"]:
        found = logits_of(model, np.array(entry["input"]))
        assert (found - torch.tensor(entry["logits"])).abs().max() < 1e-4


def test_cases_alone(dream_llm: LLM) -> None:
    for case in CASES:
        check(dream_llm, [case])


@pytest.mark.parametrize("max_num_rows", [1, 200, 4096])
def test_cases_packed_in_any_order_under_any_budget(max_num_rows: int) -> None:
    cases = random.Random(max_num_rows).sample(CASES, len(CASES))
    with LLM(CHECKPOINT, dtype="float32", device="cpu", max_num_rows=max_num_rows) as llm:
        check(llm, cases)
