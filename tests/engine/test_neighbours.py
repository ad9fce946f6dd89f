"""Measures the cost of a request with one extreme field to its neighbours, the other requests of the batch.

For every field of `SamplingParams`, one request has the legal extreme of that field. The time of its
neighbours is compared with their time if ordinary requests with as many rows run in place of the extreme one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from remask import LLM
from remask.scheduler.params import NEUTRAL, SamplingParams

PROMPT = [20] * 32
ORDINARY: dict[str, Any] = {"max_tokens": 32, "unmask": "schedule:steps=8", "seed": 1, "ignore_eos": True}
NUM_NEIGHBOURS = 16
NUM_ROWS = 64  # of an ordinary request
LARGEST, V, MASK = 512, 259, 0  # prompt and canvas; the vocabulary
LONG_STOPS = [chr(ord("A") + i) * 256 for i in range(16)]

# Field, its extreme value, and other fields that make the request legal.
EXTREMES: list[tuple[str, Any, dict[str, Any]]] = [
    ("max_tokens", LARGEST - len(PROMPT), {}),
    ("block_length", 1, {}),
    ("block_length", LARGEST - len(PROMPT), {"max_tokens": LARGEST - len(PROMPT)}),
    ("unmask", "entropy_bound:0.001", {}),
    ("unmask", "schedule:steps=8,score=margin", {}),
    ("remask", "wino:t2=1.0", {"unmask": "capped_threshold:0.3"}),
    ("remask", "wino:t2=0.9,ban_old=true", {"unmask": "capped_threshold:0.3"}),
    ("remask", "oracle_loo:0.9", {"unmask": "capped_threshold:0.3", "block_length": 8}),
    ("rank", "top", {"temperature": 1.0}),
    ("temperature", 100.0, {}),
    ("seed", 2**63 - 1, {}),
    ("n", 64, {"temperature": 1.0}),
    ("ignore_eos", False, {}),
    ("stop", LONG_STOPS, {}),
    ("stop", LONG_STOPS, {"block_length": 1}),
    ("stop_token_ids", list(range(1, V)), {}),
    ("stop_token_ids", [200] * 300_000, {}),
    ("include_stop_str_in_output", True, {"stop": ["x"]}),
    ("priority", -(2**31), {}),
    ("top_p", 1e-9, {"temperature": 1.0}),
    ("top_k", 2**31 - 1, {"temperature": 1.0}),
    ("min_p", 1.0, {"temperature": 1.0}),
    ("logit_bias", {i: -100.0 + i / 2 for i in range(V)}, {}),
    ("allowed_token_ids", list(range(V)), {}),
    ("allowed_token_ids", [20] * 300_000, {}),
    ("bad_token_ids", [i for i in range(V) if i not in (MASK, 20)], {}),
    ("bad_token_ids", [200] * 300_000, {}),
    ("cfg_scale", 100.0, {}),
    ("suppress_eos", True, {}),
    ("suppress_eos_confidence", True, {}),
    ("logprobs", 1, {}),
    ("trace", True, {}),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_rows=2048, max_n=64) as llm:
        yield llm


def neighbours_seconds(llm: LLM, ahead: list[tuple[list[int], dict[str, Any]]]) -> float:
    """CPU seconds from the intake of all requests until the neighbours of the requests `ahead` have ended."""
    asked = [*ahead, *[(PROMPT, ORDINARY)] * NUM_NEIGHBOURS]
    requests = llm.engine.intake.requests([prompt for prompt, _ in asked], [params for _, params in asked])
    waiting = {request.request_id for request in requests[len(ahead) :]}
    start = time.process_time()
    for output in llm.engine.serve(requests):
        waiting.discard(output.request_id)
        if not waiting:
            break
    return time.process_time() - start


def ordinary_ones(num_rows: int, priority: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Ordinary requests with `num_rows` rows in total; one may have a longer prompt."""
    count, more = divmod(num_rows, NUM_ROWS)
    prompts = [PROMPT] * (count - 1) + [PROMPT + [20] * more]
    return [(prompt, {**ORDINARY, "priority": priority}) for prompt in prompts]


def measured(llm: LLM, extreme: dict[str, Any], num_rounds: int) -> tuple[int, float, float, float]:
    """Rows of the extreme request, seconds of its neighbours with ordinary requests in its place, and the
    ratio of their seconds with it to those: the median of the rounds, and minimum over minimum."""
    (request,) = llm.engine.intake.requests([PROMPT], extreme)
    num_rows = sum(canvas.num_rows for canvas in request.canvases)
    others = ordinary_ones(num_rows, extreme.get("priority", 0))
    ours, theirs = [], []
    for _ in range(num_rounds):
        theirs.append(neighbours_seconds(llm, others))
        ours.append(neighbours_seconds(llm, [(PROMPT, extreme)]))
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    return num_rows, statistics.median(theirs), ratio, min(ours) / min(theirs)


def shown(value: Any) -> str:
    text = repr(value)
    if isinstance(value, list | dict):
        return f"{len(value)} entries, {len(set(value))} different"
    return text


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_extreme_field_costs_neighbours_no_more_than_ordinary_requests_of_as_many_rows(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name for name, _, _ in EXTREMES} == {*SamplingParams.__struct_fields__} - {*NEUTRAL}
    neighbours_seconds(llm, [])  # warm-up
    lines = [
        "| field | value | with | rows | seconds of neighbours | times as long, median | least to least |"
    ]
    lines.append("|---" * 7 + "|")
    slow = []
    for name, value, more in EXTREMES:
        extreme = {**ORDINARY, **more, name: value}
        for num_rounds in (3, 7, 15):  # more rounds if the ratio is too high: the machine may be busy
            num_rows, seconds, median, least = measured(llm, extreme, num_rounds)
            if min(median, least) <= 1.1:
                break
        else:
            slow.append((name, median, least))
        held = ", ".join(map(str, more))
        lines.append(
            f"| {name} | {shown(value)} | {held} | {num_rows} | {seconds:.3f} | {median:.2f} | {least:.2f} |"
        )
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert not slow
