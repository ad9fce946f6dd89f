"""Streams: deltas joined are the offline text, and what was shown never changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import GOLDEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remask import LLM, AsyncLLM, InvalidRequest, RequestOutput
from remask.outputs import CompletionOutput

PUZZLE = "513264.26..12.1..33...2.1.25......1.="
Params = dict[str, Any]
PARAMS: list[Params] = [
    {"unmask": "schedule"},
    {"unmask": "capped_threshold:0.7", "remask": "wino", "temperature": 1.0, "n": 3},
    {"unmask": "threshold:0.6", "remask": "low_prob:0.6,max_times=2,post_steps=3", "temperature": 1.5},
    {"remask": "saber"},
    {"remask": "remdm:10,cap,0.3", "temperature": 1.0},
    {"unmask": "schedule:20", "remask": "rcr"},
    {"unmask": "dream", "block_length": 48},
    {"unmask": "bernoulli", "temperature": 1.0},
    {"unmask": "schedule", "stop": ["12", "366"]},
    {"unmask": "schedule", "stop": ["63512"], "include_stop_str_in_output": True, "n": 2, "temperature": 1.5},
]


def fields(params: Params) -> Params:
    return {"max_tokens": 48, "block_length": 8, "seed": 3, "logprobs": 1, **params}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    own = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    yield own
    own.close()


def stream(llm: AsyncLLM, prompt: Any, params: Params, **options: Any) -> list[RequestOutput]:
    async def collect() -> list[RequestOutput]:
        return [output async for output in llm.generate(prompt, params, **options)]

    return asyncio.run(collect())


def joined(outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    """What the deltas of each sample make together."""
    found: dict[int, dict[str, Any]] = {}
    for output in outputs:
        for own in output.outputs:
            whole = found.setdefault(
                own.index, {"text": "", "token_ids": [], "logprobs": [], "confidences": []}
            )
            assert whole.get("finish_reason") is None, "nothing comes behind the end"
            whole["text"] += own.text or ""
            for name in ("token_ids", "logprobs", "confidences"):
                whole[name] += getattr(own, name)
            whole["finish_reason"] = own.finish_reason
    return [found[index] for index in sorted(found)]


def as_dict(own: CompletionOutput) -> dict[str, Any]:
    names = ("text", "token_ids", "logprobs", "confidences", "finish_reason")
    return {name: getattr(own, name) for name in names}


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_deltas_joined_are_the_offline_output(llm: AsyncLLM, tiny_llm: LLM, params: Params) -> None:
    (expected,) = tiny_llm.generate([PUZZLE], fields(params), use_tqdm=False)
    outputs = stream(llm, PUZZLE, fields(params), output_kind="delta")
    assert joined(outputs) == [as_dict(own) for own in expected.outputs]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) > 1 or params.get("block_length") == 48


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_what_a_cumulative_stream_shows_never_changes(llm: AsyncLLM, params: Params) -> None:
    outputs = stream(llm, PUZZLE, fields(params), output_kind="cumulative")
    shown: dict[int, CompletionOutput] = {}
    for output in outputs:
        for own in output.outputs:
            if (before := shown.get(own.index)) is not None:
                assert (own.text or "").startswith(before.text or "")
                assert own.token_ids[: len(before.token_ids)] == before.token_ids
            shown[own.index] = own
    (expected,) = stream(llm, PUZZLE, fields(params))
    last = [as_dict(shown[own.index]) for own in expected.outputs]
    assert last == [as_dict(own) for own in expected.outputs]
    assert len(outputs[-1].outputs) == params.get("n", 1), "the last one has all samples"


def test_events_build_the_canvas(llm: AsyncLLM) -> None:
    """Also without `trace`; a token that was removed is gone, and nothing changes in a finished block."""
    params = {**fields({"remask": "saber"}), "temperature": 2.0, "ignore_eos": True}
    outputs = stream(llm, PUZZLE, params, output_kind="delta", canvas_events=True)
    canvas: dict[int, tuple[int, str | None]] = {}
    removed = num_stable = 0
    for output in outputs:
        (own,) = output.outputs
        for event in own.canvas_events or []:
            assert event.position >= num_stable
            if event.is_commit:
                assert event.position not in canvas
                canvas[event.position] = event.token, event.text
            else:
                assert canvas.pop(event.position)[0] == event.token
                removed += 1
        num_stable += len(own.token_ids)
    assert removed > 0
    (expected,) = stream(llm, PUZZLE, params)
    own = expected.outputs[0]
    assert [canvas[position][0] for position in range(48)] == own.token_ids
    assert "".join(canvas[position][1] or "" for position in range(48)).startswith(own.text or "")
    assert own.trace is None
    assert outputs[-1].outputs[0].trace is None


def bytes_tokenizer(directory: Path, vocab_size: int) -> Path:
    """A token for each byte, so that a character may span tokens and blocks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("seed", range(6))
def test_characters_and_stop_strings_may_span_blocks(tmp_path: Path, seed: int) -> None:
    """Tokens of random bytes, in blocks of two: most bytes are no characters."""
    tokenizer = str(bytes_tokenizer(tmp_path, 150))
    rng = np.random.default_rng(seed)
    checkpoint, options = GOLDEN / "lladamoe-tiny", {"dtype": "float32", "device": "cpu", "max_num_rows": 512}
    params = {"max_tokens": 24, "block_length": 2, "temperature": 2.0, "seed": seed, "unmask": "schedule"}
    with LLM(checkpoint, tokenizer=tokenizer, **options) as offline:
        prompt = rng.integers(0, 150, 5).tolist()
        whole = offline.generate([prompt], params, use_tqdm=False)[0].outputs[0].text or ""
        params["stop"] = [whole[9:12]] if seed % 2 and len(whole) > 12 else None
        (expected,) = offline.generate([prompt], params, use_tqdm=False)
    own = AsyncLLM(checkpoint, tokenizer=tokenizer, **options)
    try:
        outputs = stream(own, prompt, params, output_kind="delta")
    finally:
        own.close()
    assert "".join(output.outputs[0].text or "" for output in outputs) == expected.outputs[0].text
    assert len(outputs) > 1


def test_a_slow_reader_gets_the_rest_in_one_output(llm: AsyncLLM) -> None:
    async def slow() -> list[RequestOutput]:
        found = []
        async for output in llm.generate(PUZZLE, fields(PARAMS[0]), output_kind="delta"):
            found.append(output)
            await asyncio.sleep(0 if len(found) > 1 else 3)
        return found

    outputs = asyncio.run(slow())
    assert len(outputs) <= 3
    assert joined(outputs)[0]["text"] == stream(llm, PUZZLE, fields(PARAMS[0]))[0].outputs[0].text


def test_closing_a_stream_aborts_the_request(llm: AsyncLLM) -> None:
    async def first() -> None:
        own = llm.generate(PUZZLE, fields(PARAMS[0]), output_kind="delta")
        await anext(own)
        await own.aclose()

    asyncio.run(first())
    assert stream(llm, PUZZLE, fields(PARAMS[0]))[0].finished
    assert llm.engine.num_live == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output_kind": "all"}, "output_kind"),
        ({"output_kind": "delta", "canvas_events": 1}, "canvas_events"),
        ({"canvas_events": True}, "canvas_events"),
    ],
)
def test_bad_kinds_are_refused_by_name(llm: AsyncLLM, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{named}: "):
        stream(llm, PUZZLE, {"max_tokens": 8}, **options)


def test_a_callback_hears_of_every_sample_after_every_burst(tiny_llm: LLM) -> None:
    heard: list[Any] = []
    params = {**fields(PARAMS[1]), "trace": True, "ignore_eos": True}
    (output,) = tiny_llm.generate([PUZZLE], params, use_tqdm=False, on_progress=heard.append)
    for own in output.outputs:
        progress = [one for one in heard if one.sample == own.index]
        stable = [one.num_stable_tokens for one in progress]
        assert stable == sorted(stable)
        assert stable[-1] == 48
        assert own.trace is not None
        assert sum(len(one.events.step) for one in progress) == len(own.trace.step)
    assert [one.output is not None for one in heard].count(True) == 1
    assert heard[-1].output == output
