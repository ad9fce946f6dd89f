"""The baselines write the tokens of the engine and of the published decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from golden_files import GOLDEN, canvas_of, read

from remask import LLM, SamplingParams
from remask.benchmarks import plain_cache, plain_loop, static_batch
from remask.benchmarks.plain_canvas import Decoded, PlainCanvas
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

POLICIES: dict[str, dict[str, str]] = {
    "threshold": {"unmask": "threshold:0.7"},
    "wino": {"unmask": "capped_threshold:0.2", "remask": "wino:0.9"},
    "wino, other budget": {"unmask": "capped_threshold:0.1", "remask": "wino:t2=0.9,budget=cur_accept"},
    "schedule": {"unmask": "schedule:9"},
    "schedule, verified": {"unmask": "schedule:6", "remask": "wino:0.9"},
    "factor": {"unmask": "factor:1.5"},
}


DREAM = GOLDEN / "dream-tiny"


@pytest.fixture(scope="module")
def dream_llm() -> Iterator[LLM]:
    with LLM(DREAM, dtype="float32", device="cpu") as llm:
        yield llm


def requests(policy: dict[str, str]) -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(7)
    return [
        (
            rng.integers(3, 82, prompt_len).tolist(),
            SamplingParams(max_tokens=canvas_len, block_length=block_len, seed=0, ignore_eos=True, **policy),
        )
        for prompt_len, canvas_len, block_len in ((9, 40, 16), (3, 16, 5), (17, 24, 24))
    ]


def by_engine(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[Decoded]:
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    return [Decoded(output.outputs[0].token_ids, output.outputs[0].nfe) for output in outputs]


@pytest.mark.parametrize("policy", POLICIES)
def test_baselines_write_the_engines_tokens_with_its_forwards(
    golden_llm: LLM, golden_model: TransformerDenoiser, policy: str
) -> None:
    asked = requests(POLICIES[policy])
    expected = by_engine(golden_llm, asked)
    assert [plain_loop.decode(golden_model, *request) for request in asked] == expected
    assert static_batch.decode(golden_model, asked) == expected
    assert len({decoded.nfe for decoded in expected}) > 1 or "schedule" in policy


# This model gives most committed tokens 0.9999 and more; with lower thresholds a wrong row would not show.
DOUBTS = {
    "doubts": {"unmask": "capped_threshold:0.05", "remask": "wino:0.9999"},
    "more doubts": {"unmask": "capped_threshold:0.1", "remask": "wino:0.9999"},
}


@pytest.mark.parametrize("policy", [*POLICIES, *DOUBTS])
def test_baselines_write_the_engines_tokens_on_shifted_logits(dream_llm: LLM, policy: str) -> None:
    model = load_denoiser(DREAM, dtype="float32", device="cpu")
    fields = {**POLICIES, **DOUBTS}[policy]
    asked = requests(fields)
    expected = by_engine(dream_llm, asked)
    assert [plain_loop.decode(model, *request) for request in asked] == expected
    assert static_batch.decode(model, asked) == expected
    if policy in DOUBTS:
        plain = by_engine(dream_llm, requests({"unmask": fields["unmask"]}))
        assert sum(own.nfe for own in expected) > sum(own.nfe for own in plain), "tokens are removed"


def test_a_static_batch_may_hold_every_policy_at_once(
    golden_llm: LLM, golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request for policy in POLICIES.values() for request in requests(policy)[1:]]
    monkeypatch.setattr(static_batch, "BATCH_SIZE", 8)
    assert static_batch.decode(golden_model, asked) == by_engine(golden_llm, asked)


def test_the_plain_loop_writes_the_published_winos_tokens(
    golden_model: TransformerDenoiser, golden_cases: list[dict[str, Any]]
) -> None:
    cases = [case for case in golden_cases if case["policy"] == "wino"][::10]
    assert cases
    for case in cases:
        own = case["params"]
        params = SamplingParams(
            max_tokens=own["gen_length"],
            block_length=own["block_length"],
            unmask=f"capped_threshold:{own['threshold']}",
            remask=f"wino:{own['threshold_back']}",
        )
        assert plain_loop.decode(golden_model, case["prompt"], params) == (case["output"], case["nfe"])


def test_what_the_baselines_cannot_decode_is_not_decoded_wrongly() -> None:
    canvas = PlainCanvas([5], SamplingParams(max_tokens=4, unmask="schedule:score=margin"), mask_id=0)
    with pytest.raises(NotImplementedError, match="Schedule"):
        canvas.step(np.full(4, 7), np.full(4, 0.5), None)


@pytest.mark.parametrize("reuse", ["prefix", "both"])
def test_the_loop_with_a_cache_writes_the_published_tokens(
    golden_model: TransformerDenoiser, reuse: str
) -> None:
    policy = {"prefix": "fastdllm_prefix_cache", "both": "fastdllm_dual_cache"}[reuse]
    cases = [case for case in read("llada_cache_decoding")["cases"] if case["policy"] == policy][::3]
    for case in cases:
        own = case["params"]
        unmask = f"threshold:{own['threshold']}" if "threshold" in own else f"schedule:{own['steps']}"
        params = SamplingParams(**canvas_of(case), unmask=unmask, reuse=reuse)  # type: ignore[arg-type]
        found = plain_cache.decode(golden_model, case["prompt"], params)
        assert found == Decoded(case["output"], case.get("nfe_needed", case["nfe"]))
