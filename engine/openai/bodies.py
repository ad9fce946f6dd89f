"""Parses the body of a chat or text completion into a prompt and parameters.

No field is ignored silently. A field is a parameter of `SamplingParams` (checked at intake), a supported
field of OpenAI's, or one whose value has no effect (`stream: false`, a `user` label). Any other is refused by
name. `null` means "not given", as OpenAI's clients write it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from remask.intake import CheckedPrompt, Intake
from remask.limits import check_num_prompts
from remask.scheduler.errors import InvalidRequest, UnknownModel, did_you_mean, shown
from remask.scheduler.params import SamplingParams
from remask.scheduler.policies import PRESETS
from remask.scoring import ScoreParams
from remask.text import content_text

CHAT_URL, COMPLETION_URL, SCORE_URL = "/v1/chat/completions", "/v1/completions", "/v1/score"
ROLES = ("system", "developer", "user", "assistant")
LABELS = ("user", "safety_identifier", "prompt_cache_key")  # accepted with any value, without effect

# Values of OpenAI's fields that have no effect; null never has one.
ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "trace": (False,),
    # vLLM's
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
TEMPLATE_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
CHAT_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    **ASKS_NOTHING,
    **TEMPLATE_ASKS_NOTHING,
    "add_special_tokens": (False,),  # the template writes them
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
COMPLETION_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    **ASKS_NOTHING,
    "suffix": ("",),
    "best_of": (1,),
    "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
}


class AskedScore(NamedTuple):
    """A parsed body that asks for the likelihood of a continuation, which is no endpoint of OpenAI's."""

    prompt: Any
    continuation: Any
    params: ScoreParams


class StreamOptions(NamedTuple):
    """What a stream holds beside the text."""

    include_usage: bool = False  # a last chunk with the usage
    continuous_usage_stats: bool = False  # every chunk has the usage so far, as vLLM's
    canvas: bool = False  # what each burst commits and removes


class Asked(NamedTuple):
    """A parsed body: prompts or a conversation, and fields of `SamplingParams`."""

    kind: Literal["chat", "completion"]
    contents: list[Any]  # messages or prompts; the intake checks them
    params: dict[str, Any]
    echo: bool  # the response begins with the prompt
    stream: StreamOptions | None = None  # None: one response
    names: Mapping[str, str] = MappingProxyType({})  # the body's names of parameters that have others

    def check(self, intake: Intake) -> list[CheckedPrompt]:
        """The prompts, validated.

        Raises:
            InvalidRequest: a parameter is invalid; the index of the prompt stands before it if there are
                several. `error.renamed(names)` names it as the body does.
        """
        if self.kind == "chat":
            return [intake.check(intake.chat_prompt(self.contents[0]), self.params)]
        if len(self.contents) == 1:
            return [intake.check(self.contents[0], self.params)]
        count = len(self.contents)
        check_num_prompts(intake.options, count)
        return intake.check_each(self.contents, [self.params] * count, [None] * count)


def read_body(
    kind: Literal["chat", "completion"],
    body: object,
    *,
    model_names: Collection[str],
    defaults: Mapping[str, Any],
    is_served: bool = False,
) -> Asked:
    """Parses the body of a request.

    Args:
        kind: the endpoint.
        body: the decoded JSON.
        model_names: names of the served model.
        defaults: default parameters. A preset in the body overrides them.
        is_served: whether a server answers, which takes several prompts and streams.

    Raises:
        UnknownModel: the body names another model.
        InvalidRequest: a field is unknown, not supported or missing. The intake checks the values of
            parameters.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("body", body, "must be a JSON object")
    known = _known_names(kind)
    fields = {name: value for name, value in body.items() if value is not None or name not in known}
    check_model(fields.pop("model", None), model_names)
    stream = _stream(fields) if is_served else None
    neutral = CHAT_ASKS_NOTHING if kind == "chat" else COMPLETION_ASKS_NOTHING
    drop_what_asks_nothing(fields, known, neutral, kind)
    place = "messages" if kind == "chat" else "prompt"
    if place not in fields:
        raise InvalidRequest(place, None, f"is missing; a {kind} needs it")
    if "preset" in fields and fields["preset"] not in list(PRESETS):
        problem = "is no published preset; use " + ", ".join(PRESETS)
        raise InvalidRequest("preset", fields["preset"], problem)  # and never a file that a client names
    content = fields.pop(place)
    if kind == "chat":
        contents: list[Any] = [plain_messages(content)]
    else:
        contents = _prompts(content) if is_served else [_one_prompt(content)]
    echo = fields.pop("echo", False)
    if not isinstance(echo, bool):
        raise InvalidRequest("echo", echo, "must be true or false")
    names = {"prompt_token_ids": "prompt", "prompts": "prompt"} if is_served else {}
    if "max_completion_tokens" in fields:
        names["max_tokens"] = "max_completion_tokens"
    return Asked(kind, contents, with_defaults(_own_names(fields, kind), defaults), echo, stream, names)


def read_score_body(body: object, *, model_names: Collection[str]) -> AskedScore:
    """Parses the body of a request for a likelihood: `prompt`, `continuation` and fields of `ScoreParams`.

    Raises:
        InvalidRequest: a field is unknown, invalid or missing.
    """
    known = ("prompt", "continuation", *ScoreParams.__struct_fields__)
    fields = given_fields(body, known, model_names, "score")
    for name in ("prompt", "continuation"):
        if name not in fields:
            raise InvalidRequest(name, None, "is missing; a score needs it")
    prompt, continuation = _one_prompt(fields.pop("prompt")), fields.pop("continuation")
    return AskedScore(prompt, continuation, ScoreParams.parse(**fields))


def with_defaults(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` over `defaults`; a preset that `fields` names wins over the defaults, too."""
    preset = fields.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        hidden = {"preset", *PRESETS[preset]}
        defaults = {name: value for name, value in defaults.items() if name not in hidden}
    return {**defaults, **fields}


@cache
def _known_names(kind: str) -> dict[str, None]:
    own = ("messages", "max_completion_tokens") if kind == "chat" else ("prompt", "echo")
    neutral = CHAT_ASKS_NOTHING if kind == "chat" else COMPLETION_ASKS_NOTHING
    return dict.fromkeys(("model", *own, "preset", *SamplingParams.__struct_fields__, *neutral, *LABELS))


def given_fields(
    body: object,
    known: Collection[str],
    model_names: Collection[str],
    kind: str,
    neutral: Mapping[str, tuple[object, ...]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The fields of a body without `model`, those that are null and those that ask for nothing.

    Raises:
        UnknownModel: the body names another model.
        InvalidRequest: it is no object, or has a field that is unknown in a body of this kind or not
            supported.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("body", body, "must be a JSON object")
    every = ("model", *known, *neutral)
    fields = {name: value for name, value in body.items() if value is not None or name not in every}
    drop_what_asks_nothing(fields, every, neutral, kind)
    check_model(fields.pop("model", None), model_names)
    return fields


def check_model(model: object, names: Collection[str]) -> None:
    """Raises UnknownModel unless the model is None or has one of these names."""
    if model is not None and model not in names:
        served = " or ".join(repr(name) for name in names)
        raise UnknownModel("model", model, f"is not the model that is served; it is called {served}")


def _stream(fields: dict[str, Any]) -> StreamOptions | None:
    """Removes `stream` and `stream_options` from the fields."""
    stream, options = fields.pop("stream", False), fields.pop("stream_options", None)
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", stream, "must be true or false")
    if options is None:
        return StreamOptions() if stream else None
    if not stream:
        raise InvalidRequest("stream_options", options, "is for streams; set stream to true")
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options", options, "must be an object")
    for name, value in options.items():
        if name not in StreamOptions._fields:
            fix = f"unknown option; {did_you_mean(name, StreamOptions._fields)}"
            raise InvalidRequest(f"stream_options.{name}", value, fix)
        if not isinstance(value, bool | None):
            raise InvalidRequest(f"stream_options.{name}", value, "must be true or false")
    return StreamOptions(**{name: bool(value) for name, value in options.items()})


def drop_what_asks_nothing(
    fields: dict[str, Any], known: Collection[str], neutral: Mapping[str, tuple[object, ...]], kind: str
) -> None:
    """Removes the fields whose values have no effect.

    Args:
        fields: of a body.
        known: names that a body of this kind may have.
        neutral: values that have no effect, by the names that have no others.
        kind: what errors call the body.

    Raises:
        InvalidRequest: a field is unknown or has an effect that is not supported.
    """
    for name in list(fields):
        value = fields[name]
        if name in LABELS and name in known:
            if not isinstance(value, str):
                raise InvalidRequest(name, value, "must be text")
            del fields[name]
        elif name in neutral:
            if not any(type(value) is type(other) and value == other for other in neutral[name]):
                raise InvalidRequest(name, value, "is not supported; leave it out")
            del fields[name]
        elif name not in known:
            close = did_you_mean(name, [own for own in known if own not in neutral])
            raise InvalidRequest(name, value, f"unknown field of a {kind}; {close}")


def _own_names(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """OpenAI's newer name for max_tokens, and a chat's switch for logprobs, as ours."""
    if kind == "chat" and "logprobs" in fields:
        asked = fields.pop("logprobs")
        if not isinstance(asked, bool):
            raise InvalidRequest("logprobs", asked, "must be true or false")
        fields["logprobs"] = 0 if asked else None
    if "max_completion_tokens" in fields:
        newer = fields.pop("max_completion_tokens")
        if fields.setdefault("max_tokens", newer) != newer:
            problem = f"and max_tokens {shown(fields['max_tokens'])} contradict each other; give one"
            raise InvalidRequest("max_completion_tokens", newer, problem)
    return fields


def _prompts(prompts: object) -> list[Any]:
    """One or several prompts, each text or token ids."""
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        return [_one_prompt(prompt) for prompt in prompts]
    return [_one_prompt(prompts)]


def _one_prompt(prompt: object) -> object:
    """Text or one list of token ids, never several prompts."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise InvalidRequest("prompt", prompt, "give one prompt a request: text, or a list of token ids")
    if not isinstance(prompt, str | list):
        raise InvalidRequest("prompt", prompt, "must be text or a list of token ids")
    return prompt


def plain_messages(messages: object) -> list[dict[str, str]]:
    """Messages with text content; what a message may hold besides role and content is refused."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", messages, "must be a list of at least one message")
    return [_plain_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _plain_message(place: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InvalidRequest(place, message, "must be an object with `role` and `content`")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            raise InvalidRequest(f"{place}.{name}", value, "is not supported; give role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"{place}.role", role, f"must be one of {', '.join(ROLES)}")
    return {"role": role, "content": content_text(f"{place}.content", content)}
