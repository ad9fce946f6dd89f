"""Stop strings and stop ids: where a text ends, what is returned, and that nothing is computed behind it."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from remask import LLM, InvalidRequest, SamplingParams
from remask.outputs import CompletionOutput
from remask.scheduler.canvas import TOKEN, new_canvas
from remask.scheduler.params import resolve
from remask.stops import StopStrings, find_stop

PUZZLE = "...543.....2341256..6.3..631.51.5...="


OTHER = 6  # a token that no stop string holds


def decode(ids: list[int]) -> str:
    """Tokens of two letters each, so that a stop string may begin and end inside a token."""
    return "".join("zz" if i == OTHER else "ab"[i % 2] + "abc"[i % 3] for i in ids)


@given(
    ids=st.lists(st.integers(0, 5), max_size=12),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_at_the_token_that_completes_a_stop_string(ids: list[int], strings: list[str]) -> None:
    found = find_stop(ids, strings, decode)
    for num_tokens in range(len(ids) + 1):  # as a decoder that looks at the text after every token
        present = [string for string in strings if string in decode(ids[:num_tokens])]
        if present:
            assert found == (num_tokens, present[0])
            return
    assert found is None


@given(
    lead=st.integers(0, 60),
    ids=st.lists(st.integers(0, 5), min_size=6, max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 10), st.integers(2, 6)), min_size=1, max_size=2),
    back=st.integers(0, 2) | st.integers(0, 60),
)
def test_tokens_that_complete_no_stop_string_need_not_be_looked_at_again(
    lead: int, ids: list[int], cuts: list[tuple[int, int]], back: int
) -> None:
    """After a long text, too, which is not decoded again as a whole; a stop string may begin in its end."""
    strings = [decode(ids)[place : place + length] for place, length in cuts]
    ids = [OTHER] * lead + ids
    whole = find_stop(ids, strings, decode)
    assert whole is not None
    known = max(0, whole.num_tokens - 1 - back)
    assert find_stop(ids, strings, decode, start=known) == whole


@given(ids=st.lists(st.integers(0, 6), max_size=60), start=st.integers(0, 60))
def test_a_text_without_a_stop_string_has_no_stop_wherever_one_looks(ids: list[int], start: int) -> None:
    assert find_stop(ids, ["cc", "zc"], decode, start=min(start, len(ids))) is None


TEXT = "año日本\U0001f600z"


@given(
    data=st.lists(st.sampled_from([*TEXT, "\xe6", "\x97", "\xf0"]), max_size=60),
    strings=st.lists(st.text(TEXT, min_size=1, max_size=4), min_size=1, max_size=3),
    start=st.integers(0, 200),
    lead=st.integers(0, 40),
)
def test_characters_may_span_tokens_of_one_byte(
    tiny_llm: LLM, data: list[str], strings: list[str], start: int, lead: int
) -> None:
    assert tiny_llm.tokenizer is not None
    text_of = tiny_llm.engine.intake.decode
    assert text_of is not None
    broken = [piece.encode("latin-1") if piece in "\xe6\x97\xf0" else piece.encode() for piece in data]
    vocabulary = tiny_llm.tokenizer.get_vocab()
    ids = [vocabulary[bytes_to_unicode()[byte]] for byte in b"z" * lead + b"".join(broken)]
    whole = find_stop(ids, strings, text_of)
    known = min(start, len(ids) if whole is None else whole.num_tokens - 1)
    assert find_stop(ids, strings, text_of, start=known) == whole


@pytest.mark.parametrize("silent", [False, True])
def test_the_work_for_a_block_does_not_grow_with_the_canvas(tiny_llm: LLM, silent: bool) -> None:
    def most_decoded(canvas_len: int) -> int:
        lengths = [0]

        def noting(ids: list[int]) -> str:
            lengths.append(len(ids))
            return text_of(ids)

        params = resolve({"max_tokens": canvas_len, "block_length": 1, "stop": ["1" * 20]})
        canvas = new_canvas("r", 0, [5], params, seed=0, sample=0, mask_id=0, stop_ids=[2])
        stops = StopStrings(params.stop, noting, [1])
        tokens = np.array([5] + [1 if silent else 20] * canvas_len, dtype=TOKEN).tobytes()
        for block in range(1, canvas_len + 1):
            state = msgspec.structs.replace(canvas.state, tokens=tokens, block=block)
            assert stops(canvas, state) is None
            canvas.state = state
        return max(lengths)

    text_of = tiny_llm.engine.intake.decode
    assert text_of is not None
    assert most_decoded(400) == most_decoded(200) <= 100


def ask(llm: LLM, **fields: Any) -> CompletionOutput:
    params = SamplingParams(
        **{"max_tokens": 40, "block_length": 10, "unmask": "schedule", "seed": 1, **fields}
    )
    (output,) = llm.generate(PUZZLE, params)
    return output.outputs[0]


@pytest.fixture(scope="module")
def whole(tiny_llm: LLM) -> CompletionOutput:
    return ask(tiny_llm)


def first_place(sample: CompletionOutput, length: int) -> tuple[int, str]:
    """A string of the text, from the middle of its second block, and where it first appears."""
    assert sample.text is not None
    string = sample.text[15 : 15 + length]
    return sample.text.index(string), string


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_the_canvas_at_its_block(
    tiny_llm: LLM, whole: CompletionOutput, include: bool
) -> None:
    place, string = first_place(whole, 3)
    sample = ask(tiny_llm, stop=["nowhere", string], include_stop_str_in_output=include)
    assert whole.text is not None
    assert sample.text == whole.text[: place + 3 if include else place]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", string)
    assert sample.token_ids == whole.token_ids[: place + 3]
    assert sample.num_visible_tokens == len(sample.commit_steps) == len(sample.confidences) == place + 3
    blocks = (place + 3 - 1) // 10 + 1
    assert blocks < 4
    assert sample.nfe == 10 * blocks, "forwards past the block of the stop do not happen"


def test_a_stop_string_that_does_not_appear_changes_nothing(tiny_llm: LLM, whole: CompletionOutput) -> None:
    assert ask(tiny_llm, stop="nowhere") == whole


def test_stop_strings_end_each_sample_and_request_by_its_own_text(tiny_llm: LLM) -> None:
    hot = {"max_tokens": 30, "block_length": 5, "temperature": 1.5, "rank": "top", "seed": 3, "n": 6}
    (free,) = tiny_llm.generate(PUZZLE, SamplingParams(**hot))
    (stopped, again) = tiny_llm.generate([PUZZLE, PUZZLE], [{**hot, "stop": ["1", "6"]}, hot])
    assert [sample.text for sample in again.outputs] == [sample.text for sample in free.outputs]
    for sample, whole_sample in zip(stopped.outputs, free.outputs, strict=True):
        assert whole_sample.text is not None
        ends = [whole_sample.text.index(c) for c in "16" if c in whole_sample.text]
        assert sample.text == whole_sample.text[: min(ends, default=None)]
        assert sample.nfe <= whole_sample.nfe


def test_a_stop_string_is_found_whatever_the_burst(whole: CompletionOutput) -> None:
    _, string = first_place(whole, 2)
    found = []
    for burst in (1, 3, 64):
        with LLM("tiny", device="cpu", burst=burst) as llm:
            found.append(ask(llm, stop=string))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_id_ends_the_text_like_an_end_of_sequence_token(
    tiny_llm: LLM, whole: CompletionOutput, include: bool
) -> None:
    stop_id = whole.token_ids[15]
    place = whole.token_ids.index(stop_id)
    sample = ask(tiny_llm, stop_token_ids=[stop_id], include_stop_str_in_output=include)
    assert whole.text is not None
    assert sample.text == whole.text[: place + include]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop_id)
    assert sample.token_ids == whole.token_ids[: place + 1]
    assert sample.num_visible_tokens == place
    assert sample.nfe == 10 * (place // 10 + 1)


def test_an_end_of_sequence_token_ends_the_text_before_a_stop_string_behind_it(tiny_llm: LLM) -> None:
    short = ask(tiny_llm, block_length=40)
    assert (short.stop_reason, len(short.token_ids)) == (None, 37)
    assert tiny_llm.tokenizer is not None
    eos = tiny_llm.tokenizer.eos_token_id
    own = ask(tiny_llm, block_length=40, stop_token_ids=[eos])
    assert own == short, "the model's own end has no stop reason"
    listed = ask(tiny_llm, block_length=40, ignore_eos=True, stop_token_ids=[eos])
    assert (listed.token_ids, listed.stop_reason) == (short.token_ids, eos)
    ignored = ask(tiny_llm, block_length=40, ignore_eos=True)
    assert (len(ignored.token_ids), ignored.finish_reason) == (40, "length")


def test_what_comes_first_ends_the_text(tiny_llm: LLM, whole: CompletionOutput) -> None:
    assert whole.text is not None
    stop_id, string = whole.token_ids[3], whole.text[6:9]
    place = whole.token_ids.index(stop_id)
    by_id = ask(tiny_llm, stop_token_ids=[stop_id], stop=string)
    assert (by_id.stop_reason, len(by_id.token_ids)) == (stop_id, place + 1)
    later_id = whole.token_ids[8]
    assert whole.token_ids.index(later_id) > 1
    by_string = ask(tiny_llm, stop_token_ids=[later_id], stop=whole.text[:2])
    assert (by_string.stop_reason, by_string.text) == (whole.text[:2], "")


def test_a_stop_string_in_the_last_block_is_found(tiny_llm: LLM, whole: CompletionOutput) -> None:
    assert whole.text is not None
    string = whole.text[-4:]
    sample = ask(tiny_llm, stop=string)
    assert (sample.text, sample.stop_reason) == (whole.text[: whole.text.index(string)], string)


def test_stops_that_cannot_be_looked_for_are_refused(tiny_llm: LLM, golden_llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt 0: stop: needs a tokenizer; use stop_token_ids"):
        golden_llm.generate([33, 11], SamplingParams(max_tokens=8, stop="x"))
    for stop_id in (259, 0):  # outside the vocabulary; the mask
        with pytest.raises(InvalidRequest, match="prompt 0: stop_token_ids"):
            tiny_llm.generate(PUZZLE, SamplingParams(stop_token_ids=[stop_id]))
