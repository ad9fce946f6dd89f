"""`batch_invariant=True`: no other request in the engine changes a bit of a request's results."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remask import LLM, CompletionOutput
from remask.outputs import request_output
from remask.workers.models.cpu import multiplies

POLICIES: tuple[dict[str, Any], ...] = (
    {"unmask": "schedule:score=margin"},
    {"unmask": "threshold:0.6", "temperature": 0.9},
    {"unmask": "capped_threshold:0.3", "remask": "wino:0.9", "temperature": 1.5, "rank": "top"},
    {"unmask": "capped_threshold:0.3", "remask": "wino:0.9,tile=self,ban_old=true"},
    {"unmask": "entropy_bound:1.0", "cfg_scale": 0.5},
    {"unmask": "bernoulli:2.0", "temperature": 1.0, "top_p": 0.8},
    {"unmask": "dream:alg=entropy,alg_temp=0.2", "temperature": 0.5, "top_k": 20, "block_length": None},
    {"unmask": "schedule:9", "remask": "rcr:entropy", "temperature": 1.0},
    {"remask": "saber:3,4", "temperature": 1.2},
    {"remask": "remdm:12,conf", "temperature": 1.0, "min_p": 0.02},
    {"unmask": "threshold:0.2", "remask": "low_prob:0.6,3,post_steps=2", "temperature": 1.5},
    {"unmask": "capped_threshold:0.2", "remask": "random:t2=0.95", "suppress_eos_confidence": True},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9", "logit_bias": {20: 1.0}},
)
NUM_ASKS = 26  # two of each
Ask = tuple[list[int], dict[str, Any]]


def asks(count: int, first: int = 0) -> list[Ask]:
    """Requests that differ in everything, always the same."""
    rng = random.Random(7)
    made = []
    for i in range(first + count):
        prompt = [rng.randrange(3, 82) for _ in range(rng.randrange(1, 20))]
        canvas_len = rng.randrange(1, 24)
        params = {
            "max_tokens": canvas_len,
            "block_length": rng.randrange(1, canvas_len + 1),
            "seed": i,
            "logprobs": 1,
            "trace": True,
            **POLICIES[i % len(POLICIES)],
        }
        made.append((prompt, params))
    return made[first:]


def result_of(output: CompletionOutput) -> tuple[Any, ...]:
    """Every field of a sample; floats are compared bit by bit."""
    return (
        output.token_ids,
        output.nfe,
        output.confidences,
        output.commit_steps,
        output.logprobs,
        output.trace,
    )


def generate(llm: LLM, requests: list[Ask]) -> list[tuple[Any, ...]]:
    outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    return [result_of(output.outputs[0]) for output in outputs]


has_bfloat16 = multiplies(torch.bfloat16, torch.device("cpu"))
no_bfloat16 = pytest.mark.skipif(not has_bfloat16, reason="this CPU cannot multiply bf16")
bfloat16 = pytest.param("bfloat16", marks=[no_bfloat16, pytest.mark.slow])


@pytest.fixture(scope="module", params=["float32", bfloat16])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make(golden_checkpoint: Path, dtype: Any) -> Any:
    def make(**options: Any) -> LLM:
        defaults = {"max_num_rows": 4096, "batch_invariant": True}
        return LLM(golden_checkpoint, dtype=dtype, device="cpu", **{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def invariant(make: Any) -> Iterator[LLM]:
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(invariant: LLM) -> list[tuple[Any, ...]]:
    return [generate(invariant, [ask])[0] for ask in asks(NUM_ASKS)]


@pytest.mark.parametrize("num_others", [2, pytest.param(7, marks=pytest.mark.slow), NUM_ASKS - 1])
def test_other_requests_change_no_bit(invariant: LLM, alone: list[tuple[Any, ...]], num_others: int) -> None:
    for first in range(0, NUM_ASKS - num_others, num_others + 1)[:4]:
        requests = asks(num_others + 1, first)
        assert generate(invariant, requests) == alone[first : first + num_others + 1]


def test_order_changes_no_bit(invariant: LLM, alone: list[tuple[Any, ...]]) -> None:
    places = list(range(NUM_ASKS))
    random.Random(0).shuffle(places)
    requests = asks(NUM_ASKS)
    assert generate(invariant, [requests[i] for i in places]) == [alone[i] for i in places]


@pytest.mark.parametrize(
    "options",
    [
        {"burst": 1, "max_num_rows": 100},
        pytest.param({"burst": 3, "max_num_rows": 700, "max_num_seqs": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bursts_and_budgets_change_no_bit(
    make: Any, alone: list[tuple[Any, ...]], options: dict[str, Any]
) -> None:
    with make(**options) as llm:
        assert generate(llm, asks(NUM_ASKS)) == alone


def test_neighbours_that_are_aborted_change_no_bit(make: Any, alone: list[tuple[Any, ...]]) -> None:
    with make(burst=2) as llm:
        ask = asks(NUM_ASKS)
        requests = llm.engine.intake.requests([prompt for prompt, _ in ask], [params for _, params in ask])
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        llm.engine.add(requests, ended.put)
        ended.get()  # some are done, some are not
        llm.engine.abort(request.request_id for request in requests[::2])
        kept = requests[1::2]
        while any(request.finish_time is None for request in kept):
            ended.get()
        found = [result_of(request_output(request, None).outputs[0]) for request in kept]
        assert found == alone[1::2]


def test_the_texts_are_those_of_the_faster_mode(
    golden_checkpoint: Path, alone: list[tuple[Any, ...]], dtype: str
) -> None:
    """Up to rounding, which decides some draws and some steps."""
    with LLM(golden_checkpoint, dtype=dtype, device="cpu", max_num_rows=4096) as llm:  # type: ignore[arg-type]
        found = generate(llm, asks(NUM_ASKS))
    num_equal = sum(ours[0] == theirs[0] for ours, theirs in zip(alone, found, strict=True))
    assert num_equal >= (24 if dtype == "float32" else 8)
