"""Streams: deltas joined are the offline text, and what was shown never changes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import POLICIES
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from remask import LLM, AsyncLLM, CompletionOutput, Engine, EngineOptions, InvalidRequest, RequestOutput
from remask.streaming import OutputKind, OutputStream
from remask.text import decoder_of, load_tokenizer, stable_decoder_of

PUZZLE = "513264.26..12.1..33...2.1.25......1.="
BYTES = [40, 110, 7, 130, 62]  # a prompt for `byte_engine`
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
def engine() -> Iterator[Engine]:
    """Steps in this thread, a forward at a time."""
    own = Engine(EngineOptions.parse(model="tiny", device="cpu", max_num_rows=512, burst=1))
    yield own
    own.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    own = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    yield own
    own.close()


def steps(
    engine: Engine, prompt: Any, params: Params, kind: OutputKind, *, canvas_events: bool = False
) -> list[RequestOutput]:
    """A stream whose reader hears of every burst by itself."""
    checked = engine.intake.check(prompt, params)
    request = engine.intake.request(checked)
    stream = OutputStream(request, kind, checked.params.stop, engine.tokenizer, canvas_events=canvas_events)
    engine.admission.admit([request])
    engine.add_request(request)
    found = []
    while engine.has_unfinished():
        outputs = (stream.update([progress]) for progress in engine.step())
        found += [output for output in outputs if output is not None]
    return found


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
def test_deltas_joined_are_the_offline_output(engine: Engine, tiny_llm: LLM, params: Params) -> None:
    (expected,) = tiny_llm.generate([PUZZLE], fields(params), use_tqdm=False)
    outputs = steps(engine, PUZZLE, fields(params), "delta")
    assert joined(outputs) == [as_dict(own) for own in expected.outputs]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    num_blocks = sum(-(-len(own.token_ids) // fields(params)["block_length"]) for own in expected.outputs)
    assert len(outputs) >= num_blocks, "each finished block is shown"


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_what_a_cumulative_stream_shows_never_changes(engine: Engine, tiny_llm: LLM, params: Params) -> None:
    (expected,) = tiny_llm.generate([PUZZLE], fields(params), use_tqdm=False)
    shown: dict[int, CompletionOutput] = {}
    outputs = steps(engine, PUZZLE, fields(params), "cumulative")
    for output in outputs:
        for own in output.outputs:
            if (before := shown.get(own.index)) is not None:
                assert (own.text or "").startswith(before.text or "")
                assert own.token_ids[: len(before.token_ids)] == before.token_ids
            shown[own.index] = own
    assert [as_dict(own) for own in outputs[-1].outputs] == [as_dict(own) for own in expected.outputs]


def test_events_build_the_canvas(engine: Engine) -> None:
    """Also without `trace`; a token that was removed is gone, and nothing changes in a finished block."""
    params = {**fields({"remask": "saber"}), "temperature": 2.0, "ignore_eos": True}
    outputs = steps(engine, PUZZLE, params, "delta", canvas_events=True)
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
        assert own.trace is None
    assert removed > 0
    (whole,) = joined(outputs)
    assert [canvas[position][0] for position in range(48)] == whole["token_ids"]
    assert "".join(canvas[position][1] or "" for position in range(48)).startswith(whole["text"])
    assert len(outputs) == outputs[-1].outputs[0].nfe, "an output a forward"


@pytest.mark.parametrize("params", [PARAMS[1], PARAMS[8]], ids=str)
@pytest.mark.parametrize("kind", ["delta", "cumulative"])
def test_coroutines_get_the_offline_output(llm: AsyncLLM, params: Params, kind: str) -> None:
    (expected,) = stream(llm, PUZZLE, fields(params), request_id="mine")
    outputs = stream(llm, PUZZLE, fields(params), output_kind=kind, canvas_events=True, request_id="mine")
    found = joined(outputs) if kind == "delta" else [as_dict(own) for own in outputs[-1].outputs]
    assert found == [as_dict(own) for own in expected.outputs]
    assert {output.request_id for output in (expected, *outputs)} == {"mine"}
    assert sum(len(own.canvas_events or []) for output in outputs for own in output.outputs) > 0


def bytes_tokenizer(directory: Path, kind: str) -> Path:
    """150 tokens of one byte each: letters, and the bytes of characters of two bytes. These are tokens like
    any other, as in GPT-2's tokenizer, or "fallback": tokens `<0xC3>`, as in Llama's."""
    values = [*range(0x41, 0x78), *range(0x80, 0xC0), *range(0xC2, 0xE0), 0]
    if kind == "fallback":
        names = [chr(value) if 0 < value < 0x80 else f"<0x{value:02X}>" for value in values]
        decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        names = [bytes_to_unicode()[value] for value in values]
        decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def byte_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model whose tokens are bytes, many of them parts of characters."""
    tmp_path = tmp_path_factory.mktemp("tokenizer")
    options = EngineOptions.parse(
        model=GOLDEN / "lladamoe-tiny",
        tokenizer=str(bytes_tokenizer(tmp_path, "byte level")),
        dtype="float32",
        device="cpu",
        max_num_rows=512,
        burst=1,
    )
    own = Engine(options)
    yield own
    own.close()


@pytest.mark.parametrize("kind", ["byte level", "fallback"])
def test_stable_text_never_changes(tmp_path: Path, kind: str) -> None:
    """Also where tokens without text (those from 150 on) stand between the bytes of a character."""
    tokenizer = load_tokenizer(bytes_tokenizer(tmp_path, kind), required=True)
    assert tokenizer is not None
    stable, decode = stable_decoder_of(tokenizer, 0), decoder_of(tokenizer)
    for tokens in np.random.default_rng(0).integers(0, 156, (200, 24)).tolist():
        shown = [stable(tokens[:num_tokens]) for num_tokens in range(25)]
        assert all(after.startswith(before) for before, after in itertools.pairwise([*shown, decode(tokens)]))


def whole_output(engine: Engine, prompt: Any, params: Params) -> list[CompletionOutput]:
    """Samples without a stream."""
    request = engine.intake.request(engine.intake.check(prompt, params))
    engine.admission.admit([request])
    engine.add_request(request)
    ended = [progress.output for _ in iter(engine.has_unfinished, False) for progress in engine.step()]
    (output,) = (own for own in ended if own is not None)
    return output.outputs


def test_characters_and_stop_strings_may_span_blocks(byte_engine: Engine) -> None:
    """Tokens of random bytes, in blocks of one."""
    params = fields({"max_tokens": 48, "block_length": 1, "temperature": 3.0, "n": 8, "ignore_eos": True})
    outputs = steps(byte_engine, BYTES, params, "delta")
    texts = [own["text"] for own in joined(outputs)]
    assert any("\x80" <= character < "\u0800" for text in texts for character in text)
    assert len(outputs) >= 48
    params["stop"] = [texts[0][9:12], texts[1][5:7]]
    stopped = [own["text"] for own in joined(steps(byte_engine, BYTES, params, "delta"))]
    final = whole_output(byte_engine, BYTES, params)
    assert stopped == [own.text for own in final]
    assert [own.finish_reason for own in final[:2]] == ["stop", "stop"]
    del params["stop"]
    assert texts == [own.text for own in whole_output(byte_engine, BYTES, params)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(deadline=None, max_examples=2)
@given(
    seed=st.integers(0, 10**6),
    block_length=st.sampled_from([1, 3, 8, 24]),
    stop=st.tuples(st.integers(0, 20), st.integers(1, 5)),
    keeps_stop=st.booleans(),
)
def test_under_every_policy_deltas_joined_are_the_whole_text(
    byte_engine: Engine,
    policy: Params,
    seed: int,
    block_length: int,
    stop: tuple[int, int],
    keeps_stop: bool,
) -> None:
    """With a stop string out of the text, and characters whose bytes are in several blocks."""
    params = {**fields({"max_tokens": 24, "block_length": block_length, "temperature": 2.0}), **policy}
    params |= {"seed": seed, "n": 2, "ignore_eos": True}
    first, length = stop
    text = whole_output(byte_engine, BYTES, params)[0].text or ""
    if found := text[first : first + length]:
        params |= {"stop": [found], "include_stop_str_in_output": keeps_stop}
    expected = [as_dict(own) for own in whole_output(byte_engine, BYTES, params)]
    assert joined(steps(byte_engine, BYTES, params, "delta")) == expected


def test_a_slow_reader_gets_the_rest_in_one_output(llm: AsyncLLM) -> None:
    async def slow() -> list[RequestOutput]:
        found = []
        async for output in llm.generate(PUZZLE, fields(PARAMS[0]), output_kind="delta"):
            found.append(output)
            while llm.engine.num_live:
                await asyncio.sleep(0.01)
        return found

    outputs = asyncio.run(slow())
    assert len(outputs) <= 2
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
