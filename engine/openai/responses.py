"""OpenAI's response objects of finished requests.

Beside OpenAI's fields every choice has `completion_tokens`, `nfe`, `tokens_per_forward` and `seed`, which
repeats it. Usage counts visible tokens, without the end-of-sequence token.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Literal

import msgspec
from transformers import PreTrainedTokenizerBase

from remask.outputs import CompletionOutput, RequestOutput
from remask.scheduler.errors import InvalidRequest
from remask.scoring import CheckedScore, Score
from remask.text import decoder_of, token_text_of


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a response, summed over its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's message; content is null if the model has no tokenizer."""

    role: Literal["assistant"] = "assistant"
    content: str | None


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of a chat with its log-probability; alternatives are not known."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The visible tokens of a chat's choice."""

    content: list[TokenLogprob]


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The visible tokens of a text completion's choice. With `echo` those of the prompt come first, without a
    log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: None = None  # alternatives are not known
    text_offset: list[int]  # where each token begins, if every token is decoded by itself


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both kinds of choices."""

    index: int
    finish_reason: str
    stop_reason: int | str | None  # as vLLM: the stop string or id
    completion_tokens: int  # visible tokens, of this sample
    nfe: int
    tokens_per_forward: float
    seed: int


class ChatChoice(_Choice, frozen=True, kw_only=True):
    """One sample of a chat."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class TextChoice(_Choice, frozen=True, kw_only=True):
    """One sample of a text completion."""

    text: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET  # only if the model has no tokenizer
    logprobs: TextLogprobs | None


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
    kind: Literal["chat", "completion"],
    output: RequestOutput,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    echo: bool = False,
    id: str,
    created: int,
    model: str,
) -> Completion:
    """The response to a request that has finished.

    Args:
        kind: the endpoint.
        output: what the engine wrote.
        tokenizer: the model's; None: texts are null, and tokens are written like `token_id:7`, as by vLLM.
        echo: the text of a text completion begins with the prompt.
    """
    num_prompt = len(output.prompt_token_ids)
    num_visible = sum(sample.num_visible_tokens for sample in output.outputs)
    chat = kind == "chat"
    return Completion(
        id=id,
        object="chat.completion" if chat else "text_completion",
        created=created,
        model=model,
        choices=(
            [_chat_choice(sample, tokenizer) for sample in output.outputs]
            if chat
            else [_text_choice(sample, output if echo else None, tokenizer) for sample in output.outputs]
        ),
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


def _chat_choice(sample: CompletionOutput, tokenizer: PreTrainedTokenizerBase | None) -> ChatChoice:
    logprobs = None
    if sample.logprobs is not None:
        num_visible = sample.num_visible_tokens
        tokens = _token_texts(sample.token_ids[:num_visible], tokenizer)
        content = [
            TokenLogprob(token=text, logprob=logprob, bytes=list(text.encode()))
            for text, logprob in zip(tokens, sample.logprobs[:num_visible], strict=True)
        ]
        logprobs = ChatLogprobs(content=content)
    return ChatChoice(message=ChatMessage(content=sample.text), logprobs=logprobs, **_common(sample))


def _text_choice(
    sample: CompletionOutput, echoed: RequestOutput | None, tokenizer: PreTrainedTokenizerBase | None
) -> TextChoice:
    prompt_ids = [] if echoed is None else echoed.prompt_token_ids
    text, token_ids = sample.text, msgspec.UNSET
    if text is None:
        token_ids = [*prompt_ids, *sample.token_ids]
    elif echoed is not None:
        assert tokenizer is not None, "a text was made by it"
        text = (decoder_of(tokenizer)(prompt_ids) if echoed.prompt is None else echoed.prompt) + text
    logprobs = None
    if sample.logprobs is not None:
        num_visible = sample.num_visible_tokens
        tokens = _token_texts([*prompt_ids, *sample.token_ids[:num_visible]], tokenizer)
        logprobs = TextLogprobs(
            tokens=tokens,
            token_logprobs=[*[None] * len(prompt_ids), *sample.logprobs[:num_visible]],
            text_offset=list(accumulate(map(len, tokens), initial=0))[:-1],
        )
    return TextChoice(text=text, token_ids=token_ids, logprobs=logprobs, **_common(sample))


def _token_texts(token_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    text_of = token_text_of(tokenizer)
    texts = ((token_id, text_of(token_id)) for token_id in token_ids)
    return [f"token_id:{token_id}" if text is None else text for token_id, text in texts]


def _common(sample: CompletionOutput) -> dict[str, Any]:
    names = ("index", "finish_reason", "stop_reason", "nfe", "tokens_per_forward", "seed")
    return {"completion_tokens": sample.num_visible_tokens, **{name: getattr(sample, name) for name in names}}
