"""OpenAI's response objects of finished requests.

Beside OpenAI's fields every choice has `completion_tokens`, `nfe`, `tokens_per_forward` and `seed`, which
repeats it. Usage counts visible tokens, without the end-of-sequence token.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from remask.outputs import CompletionOutput, RequestOutput
from remask.scheduler.errors import InvalidRequest
from remask.scoring import CheckedScore, Score


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a response, summed over its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's message; content is null if the model has no tokenizer."""

    role: Literal["assistant"] = "assistant"
    content: str | None


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both kinds of choices."""

    index: int
    logprobs: None = None
    finish_reason: str
    stop_reason: int | str | None  # as vLLM: the stop string or id
    completion_tokens: int  # visible tokens, of this sample
    nfe: int
    tokens_per_forward: float
    seed: int


class ChatChoice(_Choice, frozen=True, kw_only=True):
    """One sample of a chat."""

    message: ChatMessage


class TextChoice(_Choice, frozen=True, kw_only=True):
    """One sample of a text completion."""

    text: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET  # only if the model has no tokenizer


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A `chat.completion` or a `text_completion`."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int  # Unix seconds
    model: str
    choices: list[ChatChoice] | list[TextChoice]
    usage: Usage


class ScoreResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The likelihood of a continuation; see `remask.scoring.Score`."""

    id: str
    object: Literal["score"] = "score"
    created: int  # Unix seconds
    model: str
    score: Score
    usage: Usage


def score_response(
    checked: CheckedScore, output: RequestOutput, *, id: str, created: int, model: str
) -> ScoreResponse:
    """The response to a score that has finished. Usage has no completion."""
    num_prompt = len(checked.ids) + len(checked.continuation)
    usage = Usage(prompt_tokens=num_prompt, completion_tokens=0, total_tokens=num_prompt)
    return ScoreResponse(id=id, created=created, model=model, score=checked.score(output), usage=usage)


def completion(
    kind: Literal["chat", "completion"], output: RequestOutput, *, id: str, created: int, model: str
) -> Completion:
    """The response to a request that has finished."""
    num_prompt = len(output.prompt_token_ids)
    num_visible = sum(sample.num_visible_tokens for sample in output.outputs)
    chat = kind == "chat"
    return Completion(
        id=id,
        object="chat.completion" if chat else "text_completion",
        created=created,
        model=model,
        choices=[(_chat_choice if chat else _text_choice)(sample) for sample in output.outputs],  # type: ignore[arg-type]
        usage=Usage(
            prompt_tokens=num_prompt, completion_tokens=num_visible, total_tokens=num_prompt + num_visible
        ),
    )


def error_body(error: InvalidRequest) -> dict[str, Any]:
    """OpenAI's error object for a request that was refused."""
    return _error_body(str(error), "invalid_request_error", error.parameter)


def failure_body(output: RequestOutput) -> dict[str, Any]:
    """OpenAI's error object for a request that has failed; its type is the class of the error."""
    assert output.error is not None, "it has failed"
    return _error_body(output.error, output.error_type, None)


def _error_body(message: str, kind: str | None, parameter: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def _chat_choice(sample: CompletionOutput) -> ChatChoice:
    return ChatChoice(message=ChatMessage(content=sample.text), **_common(sample))


def _text_choice(sample: CompletionOutput) -> TextChoice:
    token_ids = msgspec.UNSET if sample.text is not None else sample.token_ids
    return TextChoice(text=sample.text, token_ids=token_ids, **_common(sample))


def _common(sample: CompletionOutput) -> dict[str, Any]:
    names = ("index", "finish_reason", "stop_reason", "nfe", "tokens_per_forward", "seed")
    return {"completion_tokens": sample.num_visible_tokens, **{name: getattr(sample, name) for name in names}}
