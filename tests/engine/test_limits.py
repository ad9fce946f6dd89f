"""Ceilings of a call: a value above one is refused by name, before any request of the call runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from remask import LLM, AsyncLLM, EngineOptions, InvalidRequest, SamplingParams

HOT = {"temperature": 1.0, "max_tokens": 4}
TIGHT = {
    "max_prompts_per_call": 3,
    "max_tokens_per_call": 40,
    "max_n": 5,
    "max_stop_strings": 2,
    "max_stop_len": 6,
}


@pytest.fixture(scope="module")
def tight_llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_rows=4096, **TIGHT) as llm:
        yield llm


@pytest.mark.parametrize(
    ("num_prompts", "fields", "message"),
    [
        (4, HOT, "prompts: .*at most 3 a call"),
        (1, {**HOT, "n": 6}, "prompt 0: n: is above the engine's max_n; use at most 5"),
        (
            3,
            {**HOT, "n": 4},
            "prompt 2: n: the call asks for 48 tokens or more, above .* 40; use a smaller n",
        ),
        (1, {"max_tokens": 41}, "prompt 0: max_tokens: the call asks for 41 tokens"),
        (1, {**HOT, "stop": ["a", "b", "c"]}, "prompt 0: stop: .*max_stop_strings; use at most 2"),
        (1, {**HOT, "stop": "1234567"}, "prompt 0: stop: .*max_stop_len; use at most 6"),
    ],
)
def test_what_is_above_a_ceiling_is_refused_by_name(
    tight_llm: LLM, num_prompts: int, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tight_llm.generate(["1+1="] * num_prompts, fields)


ONE_CHAT = [{"role": "user", "content": "1+1="}]


class Endless(Iterator[Any]):
    """An iterator that never ends, and counts what is taken from it."""

    def __init__(self, entry: object) -> None:
        self.entry, self.num_taken = entry, 0

    def __next__(self) -> object:
        self.num_taken += 1
        assert self.num_taken < 10**7, "it is taken without end"
        return self.entry


@pytest.mark.parametrize(
    ("call", "entry", "num_taken", "message"),
    [
        ("generate", "1+1=", 4, r"prompts: .*at most 3 a call \(got 4\)"),
        ("generate", [5, 6], 4, r"prompts: .*at most 3 a call \(got 4\)"),
        ("generate", 5, 513, "prompt 0: max_tokens: prompt of 513 tokens and canvas exceed"),
        ("chat", ONE_CHAT, 4, r"prompts: .*at most 3 a call \(got 4\)"),
        ("chat", ONE_CHAT[0], 513, "prompt 0: max_tokens: prompt of .* tokens and canvas exceed"),
    ],
)
def test_one_prompt_more_than_allowed_is_taken_from_an_endless_iterator(
    tight_llm: LLM, call: str, entry: object, num_taken: int, message: str
) -> None:
    endless = Endless(entry)
    with pytest.raises(InvalidRequest, match=message):
        getattr(tight_llm, call)(endless, HOT)
    assert endless.num_taken == num_taken


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([Endless(5)], {}, r"prompt 0: prompt: must be text or a list of token ids \(got <"),
        ({"prompt_token_ids": Endless(5)}, {}, "prompt 0: prompt: must be text or a list of token ids"),
        ("1+1=", {"stop": Endless("x")}, "prompt 0: stop: expected"),
        ("1+1=", {"logit_bias": {5: Endless(1.0)}}, "prompt 0: logit_bias: expected"),
    ],
)
def test_a_value_without_end_is_refused_by_name(
    tight_llm: LLM, prompt: object, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tight_llm.generate(prompt, {**HOT, **fields})  # type: ignore[arg-type]


def test_what_reaches_a_ceiling_is_served(tight_llm: LLM) -> None:
    params = SamplingParams(**HOT, n=5, stop=["a", "a", "bbbbbb"])
    outputs = tight_llm.generate(["1+1="] * 2, params)
    assert [len(output.outputs) for output in outputs] == [5, 5]


def test_the_default_ceilings_are_the_documented_ones(tiny_llm: LLM) -> None:
    options = EngineOptions(model="tiny")
    assert (options.max_n, options.max_stop_strings, options.max_stop_len) == (1024, 16, 256)
    with pytest.raises(InvalidRequest, match="n: is above"):
        tiny_llm.generate("1+1=", {**HOT, "n": 1025})


async def _ask(fields: dict[str, Any]) -> None:
    async with await AsyncLLM.start("tiny", device="cpu", max_num_rows=4096, **TIGHT) as llm:
        async for _ in llm.generate("1+1=", fields):
            pass


def test_ceilings_hold_for_coroutines() -> None:
    with pytest.raises(InvalidRequest, match="n: is above"):
        asyncio.run(_ask({**HOT, "n": 6}))


@pytest.mark.parametrize("name", ["allowed_token_ids", "bad_token_ids", "logit_bias", "stop_token_ids"])
def test_ids_must_lie_in_the_vocabulary(tiny_llm: LLM, name: str) -> None:
    ids = [7, 3000, 8]
    with pytest.raises(InvalidRequest, match=f"prompt 0: {name}: ") as caught:
        tiny_llm.generate("1+1=", {**HOT, name: dict.fromkeys(ids, 1.0) if name == "logit_bias" else ids})
    assert caught.value.value == 3000
