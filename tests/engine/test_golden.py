"""The 104 outputs of the published decoders (tests/data/golden), token by token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from remask import LLM, CappedThreshold, SamplingParams, Schedule, Threshold, Wino

Case = dict[str, Any]
OPTIONS = {  # of the reference: ours
    "cfg_scale": "cfg_scale",
    "logits_eos_inf": "suppress_eos",
    "confidence_eos_eot_inf": "suppress_eos_confidence",
}


def params_of(case: Case, **overrides: Any) -> SamplingParams:
    params = case["params"]
    policies: dict[str, Any] = {
        "llada": lambda: {"unmask": Schedule(params["steps"])},
        "fastdllm": lambda: {"unmask": Threshold(params["threshold"])},
        "wino": lambda: {
            "unmask": CappedThreshold(params["threshold"]),
            "remask": Wino(params["threshold_back"]),
        },
    }[case["policy"]]()
    options = {ours: params[theirs] for theirs, ours in OPTIONS.items() if theirs in params}
    fields = {
        "max_tokens": params["gen_length"],
        "block_length": params["block_length"],
        **policies,
        **options,
    }
    return SamplingParams(**{"ignore_eos": True, **fields, **overrides})


def check(llm: LLM, cases: list[Case]) -> None:
    outputs = llm.generate([case["prompt"] for case in cases], [params_of(case) for case in cases])
    for case, output in zip(cases, outputs, strict=True):
        sample = output.outputs[0]
        assert (sample.token_ids, sample.nfe) == (case["output"], case["nfe"]), case["params"]


def test_there_are_104_cases(golden_cases: list[Case]) -> None:
    assert len(golden_cases) == 104
    assert {case["policy"] for case in golden_cases} == {"llada", "fastdllm", "wino"}


@pytest.mark.parametrize(
    ("max_num_rows", "burst", "count"),
    [
        pytest.param(300, None, 20, id="few at a time"),
        pytest.param(1, 3, 35, id="alone", marks=pytest.mark.slow),
    ],
)
def test_cases_in_one_call_in_any_order_under_any_budget(
    golden_checkpoint: Path, golden_cases: list[Case], max_num_rows: int, burst: int | None, count: int
) -> None:
    cases = random.Random(max_num_rows + (burst or 0)).sample(golden_cases, count)
    with LLM(golden_checkpoint, dtype="float32", device="cpu", max_num_rows=max_num_rows, burst=burst) as llm:
        check(llm, cases)


@pytest.mark.slow
def test_all_cases_packed_into_one_forward(
    golden_checkpoint: Path, golden_cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remask.workers.models.denoiser.CPU_PACK_ROWS", 1 << 30)
    with LLM(golden_checkpoint, dtype="float32", device="cpu", max_num_rows=1 << 20, burst=1) as llm:
        check(llm, golden_cases)


def test_stopping_at_eos_keeps_the_text_before_it(golden_llm: LLM, golden_cases: list[Case]) -> None:
    stop_ids, cases = (1, 2), golden_cases[::6]
    outputs = golden_llm.generate(
        [case["prompt"] for case in cases], [params_of(case, ignore_eos=False) for case in cases]
    )
    num_stopped = num_saved = 0
    for case, output in zip(cases, outputs, strict=True):
        sample, reference = output.outputs[0], case["output"]
        end = next((i for i, token in enumerate(reference) if token in stop_ids), None)
        if end is None:
            assert (sample.token_ids, sample.finish_reason) == (reference, "length")
        else:
            assert (sample.token_ids, sample.finish_reason) == (reference[: end + 1], "stop")
            assert sample.num_visible_tokens == end
            num_stopped += 1
        assert sample.nfe <= case["nfe"]
        num_saved += case["nfe"] - sample.nfe
    assert num_stopped > 0
    assert num_saved > 0, "blocks behind an EOS are not computed"
