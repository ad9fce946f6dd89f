"""Request bodies of OpenAI's endpoints: honoured, without meaning, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remask import InvalidRequest
from remask.openai.bodies import Asked, read_body, with_defaults
from remask.scheduler.params import SamplingParams

HELLO = [{"role": "user", "content": "hello"}]


def read(kind: Any = "chat", defaults: Any = None, **body: Any) -> Asked:
    body = {("messages" if kind == "chat" else "prompt"): HELLO if kind == "chat" else "hello", **body}
    return read_body(kind, body, model_names=("tiny", "other"), defaults=defaults or {})


def test_the_fields_of_sampling_params_stand_under_their_own_names() -> None:
    asked = read(unmask="threshold:0.7", remask={"type": "wino", "t2": 0.9}, n=2, seed=5, model="other")
    assert asked.params == {
        "unmask": "threshold:0.7",
        "remask": {"type": "wino", "t2": 0.9},
        "n": 2,
        "seed": 5,
    }
    assert asked.contents == [HELLO]
    assert read("completion", prompt=[1, 2]).contents == [[1, 2]]


def test_the_newer_name_of_max_tokens_is_the_same() -> None:
    assert read(max_completion_tokens=7).params == {"max_tokens": 7}
    assert read(max_completion_tokens=7, max_tokens=7).params == {"max_tokens": 7}
    with pytest.raises(InvalidRequest, match="max_completion_tokens: and max_tokens 8 contradict"):
        read(max_completion_tokens=7, max_tokens=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"top_logprobs": 0},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"user": "somebody", "metadata": {}, "store": False},
        {"min_tokens": 0, "skip_special_tokens": True, "add_generation_prompt": True, "length_penalty": 1},
        dict.fromkeys(("model", "stream", "tools", "seed", "max_tokens", "temperature", "remask")),
    ],
)
def test_what_asks_for_nothing_is_accepted_and_leaves_no_trace(fields: dict[str, Any]) -> None:
    assert read(**fields).params == {}


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("chat", {"stream": True}, "stream: is not supported"),
        ("chat", {"stream": 0}, "stream"),
        ("chat", {"logprobs": 1}, "logprobs: must be true or false"),
        ("chat", {"logprobs": True, "top_logprobs": 2}, "top_logprobs: is not supported"),
        ("chat", {"echo": True}, "echo: unknown field of a chat"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"temprature": 1.0}, "temprature: unknown field of a chat; did you mean 'temperature'"),
        ("chat", {"temprature": None}, "temprature: unknown field"),
        ("chat", {"fillers": 1}, "fillers: unknown field of a chat; known: model, messages"),
        ("chat", {"min_token": 1}, "did you mean 'max_tokens'"),
        ("completion", {"prompt_logprobs": 1}, "prompt_logprobs: is not supported; leave it out"),
        ("chat", {"prompt": "x"}, "prompt: unknown field of a chat"),
        ("chat", {"messages": None}, "messages: is missing"),
        ("chat", {"user": 5}, "user: must be text"),
        (
            "chat",
            {"model": "gpt-4o"},
            "model: is not the model that is served; it is called 'tiny' or 'other'",
        ),
        ("chat", {"model": ["tiny"]}, "model: is not"),
        ("completion", {"echo": "yes"}, "echo: must be true or false"),
        ("completion", {"best_of": 2}, "best_of"),
        ("completion", {"best_of": True}, "best_of"),
        ("completion", {"suffix": "x"}, "suffix"),
        ("completion", {"prompt": None}, "prompt: is missing"),
        ("completion", {"prompt": ["a", "b"]}, "prompt: give one prompt a request"),
        ("completion", {"prompt": [[1], [2]]}, "prompt: give one prompt a request"),
        ("completion", {"prompt": 5}, "prompt: must be text"),
        ("completion", {"messages": HELLO}, "messages: unknown field of a completion"),
    ],
)
def test_everything_else_is_refused_by_name(kind: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(kind, **fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("hello", "messages[0]: must be an object"),
        ({"role": "usr", "content": "x"}, "messages[0].role: must be one of system"),
        ({"role": "user"}, "messages[0].content: must be text"),
        ({"role": "user", "content": "x", "name": "me"}, "messages[0].name: is not supported"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]: must be"),
    ],
)
def test_messages_hold_role_and_text(message: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(messages=[message])
    assert named in str(caught.value)


def test_text_parts_are_lines_of_the_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = read(messages=[{"role": "user", "content": parts, "tool_calls": None}])
    assert asked.contents == [[{"role": "user", "content": "a\nb"}]]


def test_logprobs_of_both_kinds_ask_for_those_of_the_committed_tokens() -> None:
    assert read(logprobs=True).params == {"logprobs": 0}
    assert read(logprobs=False, defaults={"logprobs": 0}).params == {"logprobs": None}
    assert read("completion", logprobs=1).params == {"logprobs": 1}
    assert read("completion", logprobs=None).params == {}


def test_a_text_completion_may_begin_with_its_prompt() -> None:
    assert read("completion", echo=True).echo
    assert not read("completion", echo=None).echo


def test_defaults_give_way_to_the_body_and_to_its_preset() -> None:
    defaults = {"max_tokens": 16, "unmask": "threshold:0.5", "temperature": 1.0, "preset": "llada"}
    assert with_defaults({"temperature": 0.5}, defaults) == {**defaults, "temperature": 0.5}
    assert with_defaults({"preset": "wino"}, defaults) == {
        "max_tokens": 16,
        "temperature": 1.0,
        "preset": "wino",
    }


def test_every_parameter_is_known_in_a_body() -> None:
    """The intake checks the values, including those of parameters that it does not support yet."""
    for name in SamplingParams.__struct_fields__:
        if name not in ("logprobs", "trace"):  # of another type in a chat, and not part of a response
            assert read(**{name: "a value"}).params == {name: "a value"}


def test_a_body_names_no_file_as_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('unmask = "threshold:0.5"')
    with pytest.raises(InvalidRequest, match="preset: is no published preset"):
        read(preset=str(path))
