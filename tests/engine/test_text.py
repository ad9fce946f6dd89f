"""Special tokens in prompts and stop strings, message parts, and chat templates that fail."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remask import LLM, EngineOptions, InvalidRequest
from remask.batch.run import BatchOptions, run_batch
from remask.checkpoint import intake_of
from remask.intake import Intake
from remask.text import PromptEncoder

MASK, EOT = "<|mdm_mask|>", "<|eot_id|>"


@pytest.fixture
def with_template(tmp_path: Path) -> Any:
    """`with_template(template)`: an intake whose tokenizer has that chat template."""

    def make(template: Any) -> Intake:
        with as_file(files("remask") / "tiny") as tiny:
            model = Path(shutil.copytree(tiny, tmp_path / "model", dirs_exist_ok=True))
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        return intake_of(EngineOptions(model=str(model)))

    return make


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_the_masks_text_in_a_prompt_means_its_characters(tiny_llm: LLM) -> None:
    assert tiny_llm.tokenizer is not None
    spelled = [token for c in MASK for token in tiny_llm.tokenizer.encode(c)]
    outputs = tiny_llm.generate([MASK, f"1{MASK}{MASK}2{EOT}", "12"], {"max_tokens": 1})
    assert outputs[0].prompt_token_ids == spelled
    one, two = outputs[2].prompt_token_ids
    assert outputs[1].prompt_token_ids == [one, *spelled, *spelled, two, 2], "other special tokens stay"
    (chat,) = tiny_llm.chat(user(f"a{MASK}"), {"max_tokens": 1})
    assert (chat.prompt, len(chat.prompt_token_ids)) == (f"a{MASK}=", len(MASK) + 2)


@pytest.mark.parametrize("prompt", [[19, 0], {"prompt_token_ids": [0]}, np.array([0, 5])])
def test_the_masks_id_in_a_prompt_is_refused_by_name(tiny_llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt 0: prompt_token_ids: is the mask id.*\(got 0\)"):
        tiny_llm.generate(prompt)


def test_a_mask_that_has_no_other_ids_is_refused_by_name(tiny_llm: LLM, monkeypatch: Any) -> None:
    encode = type(tiny_llm.tokenizer).encode
    monkeypatch.setattr(
        type(tiny_llm.tokenizer),
        "encode",
        lambda self, text, split_special_tokens=False, **options: encode(self, text, **options),
    )
    encoder = PromptEncoder(tiny_llm.tokenizer, mask_id=0)
    assert encoder.encode("a", add_special_tokens=True) == tiny_llm.tokenizer.encode("a")
    with pytest.raises(InvalidRequest, match=r"prompt: holds the mask token '<\|mdm_mask\|>'"):
        encoder.encode(f"a{MASK}", add_special_tokens=True)


def test_encoding_changes_no_setting_that_other_threads_see(tiny_llm: LLM) -> None:
    backend = tiny_llm.tokenizer._tokenizer
    encoder = PromptEncoder(tiny_llm.tokenizer, mask_id=0)
    assert not backend.encode_special_tokens
    encoder.encode(f"a{MASK}", add_special_tokens=True)
    assert not backend.encode_special_tokens


def test_a_stop_string_that_is_a_special_token_ends_the_text_there(tiny_llm: LLM) -> None:
    ask = {"max_tokens": 12, "ignore_eos": True}
    whole = tiny_llm.generate("123+456=", ask)[0].outputs[0]
    (special,) = {1, 2} & set(whole.token_ids)
    text = "<|endoftext|>" if special == 1 else EOT
    for stop in (text, ["nowhere", text]):
        sample = tiny_llm.generate("123+456=", {**ask, "stop": stop})[0].outputs[0]
        end = whole.token_ids.index(special)
        assert sample.token_ids == whole.token_ids[: end + 1]
        assert (sample.text, sample.finish_reason, sample.stop_reason) == ("0579", "stop", special)


@pytest.mark.parametrize(
    ("stop", "problem"),
    [
        (f"\n{EOT}", r"stop: holds the special token '<\|eot_id\|>'.*stop_token_ids \[2\]"),
        (["a", MASK], "stop: holds the mask token"),
    ],
)
def test_a_stop_string_that_no_text_can_show_is_refused(tiny_llm: LLM, stop: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        tiny_llm.generate("1+1=", {"stop": stop})


def test_a_chat_takes_text_parts_arrays_and_iterators(tiny_llm: LLM) -> None:
    parts = [{"type": "text", "text": "123"}, {"type": "text", "text": "+456", "image_url": None}]
    (output,) = tiny_llm.chat(user(parts), {"max_tokens": 1})
    assert output.prompt == "123\n+456="
    many: list[Any] = [
        np.array([user("1"), user("2")], object),
        iter([user("1"), iter(user("2"))]),
        (tuple(user("1")), np.array(user("2"), object)),
    ]
    for messages in many:
        assert [o.prompt for o in tiny_llm.chat(messages, {"max_tokens": 1})] == ["1=", "2="]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"messages\[0\]\[0\].content: must be text"),
        (7, r"messages\[0\]\[0\].content: must be text"),
        ([{"type": "image_url"}], r"messages\[0\]\[0\].content\[0\]: must be"),
        (["x"], r"messages\[0\]\[0\].content\[0\]: must be"),
    ],
)
def test_other_contents_are_refused_by_name(tiny_llm: LLM, content: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        tiny_llm.chat(user(content))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]['content'] + 7 }}", "TypeError"),
        ("{{ 7 / (messages | length - 1) }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses it"),
        ("{{ raise_exception('roles\nmust alternate' + 'x' * 500) }}", "refuses it: roles must alternate"),
        ("{% if %}", "refuses it"),
        ([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}], "fails: ValueError"),
        (7, "fails"),
    ],
)
def test_a_template_that_fails_is_an_error_of_one_line(
    with_template: Any, template: Any, expected: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_template(template).chat_prompts(user("x"))
    assert caught.value.parameter == "messages[0]"
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_lines_that_a_template_fails_for_are_recorded(
    tiny_llm: LLM, with_template: Any, tmp_path: Path
) -> None:
    intake = with_template("{{ messages[0]['content'] + (7 if 'x' in messages[0]['content'] else '=') }}")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"messages": user(text)}) + "\n" for text in ("7+8", "x")))
    options = BatchOptions(engine=intake.options, defaults={"max_tokens": 4}, record_invalid=True)
    run_batch(source, tmp_path / "out.jsonl", lambda: nullcontext(tiny_llm), options)
    found = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(response["status_code"] for response in found) == [200, 400]
