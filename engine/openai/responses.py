"""OpenAI's response objects of finished requests.

Beside OpenAI's fields every choice has `completion_tokens`, `nfe`, `tokens_per_forward` and `seed`, which
repeats it. Usage counts visible tokens, without the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Generic, Literal, TypeVar

import msgspec
from transformers import PreTrainedTokenizerBase

from remask.outputs import CompletionOutput, RequestOutput
from remask.scheduler.errors import InvalidRequest, RemaskError, UnknownModel
from remask.scoring import CheckedScore, Score
from remask.text import decoder_of, token_text_of

ID_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl", "score": "score"}


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


Choice = TypeVar("Choice", ChatChoice, TextChoice)


class Completion(msgspec.Struct, Generic[Choice], frozen=True, kw_only=True):
    """A `chat.completion` or a `text_completion`."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int  # Unix seconds
    model: str
    choices: list[Choice]
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
    outputs: Sequence[RequestOutput],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    echo: bool = False,
    id: str,
    created: int,
    model: str,
) -> Completion[Any]:
    """The response to requests that have finished.

    Args:
        kind: the endpoint.
        outputs: an output for each prompt, with equally many samples. The choices are those of the first
            prompt, then those of the second, and so on.
        tokenizer: the model's; None: texts are null, and tokens are written like `token_id:7`, as by vLLM.
        echo: the text of a text completion begins with the prompt.
    """
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    choices: list[Any] = [
        _chat_choice(index, sample, tokenizer)
        if kind == "chat"
        else _text_choice(index, sample, output if echo else None, tokenizer)
        for index, (output, sample) in enumerate(samples)
    ]
    return Completion(
        id=id,
        object="chat.completion" if kind == "chat" else "text_completion",
        created=created,
        model=model,
        choices=choices,
        usage=usage_of(outputs, sum(sample.num_visible_tokens for _, sample in samples)),
    )


def usage_of(outputs: Iterable[RequestOutput], num_visible: int) -> Usage:
    """The usage of requests, an output of each, with the visible tokens of all their samples."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return Usage(
        prompt_tokens=num_prompt, completion_tokens=num_visible, total_tokens=num_prompt + num_visible
    )


def error_body(error: RemaskError) -> dict[str, Any]:
    """OpenAI's error object. The type of an invalid request is OpenAI's, of others it is the class."""
    if not isinstance(error, InvalidRequest):
        return error_object(str(error), type(error).__name__)
    code = "model_not_found" if isinstance(error, UnknownModel) else None
    return error_object(str(error), "invalid_request_error", error.field, code)


def failure_body(output: RequestOutput) -> dict[str, Any]:
    """OpenAI's error object for a request that has failed; its type is the class of the error."""
    assert output.error is not None, "it has failed"
    return error_object(output.error, output.error_type)


def error_object(
    message: str, kind: str | None, parameter: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _chat_choice(
    index: int, sample: CompletionOutput, tokenizer: PreTrainedTokenizerBase | None
) -> ChatChoice:
    return ChatChoice(
        message=ChatMessage(content=sample.text),
        logprobs=chat_logprobs(sample, tokenizer),
        **sample_figures(index, sample),
    )


def chat_logprobs(sample: CompletionOutput, tokenizer: PreTrainedTokenizerBase | None) -> ChatLogprobs | None:
    """The log-probabilities of a sample's visible tokens; None if it has none."""
    if sample.logprobs is None:
        return None
    num_visible = sample.num_visible_tokens
    tokens = token_texts(sample.token_ids[:num_visible], tokenizer)
    content = [
        TokenLogprob(token=text, logprob=logprob, bytes=list(text.encode()))
        for text, logprob in zip(tokens, sample.logprobs[:num_visible], strict=True)
    ]
    return ChatLogprobs(content=content)


def _text_choice(
    index: int,
    sample: CompletionOutput,
    echoed: RequestOutput | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TextChoice:
    text, token_ids, logprobs = text_parts(sample, echoed, tokenizer)
    return TextChoice(text=text, token_ids=token_ids, logprobs=logprobs, **sample_figures(index, sample))


def text_parts(
    sample: CompletionOutput,
    echoed: RequestOutput | None,
    tokenizer: PreTrainedTokenizerBase | None,
    offset: int = 0,
) -> tuple[str | None, list[int] | msgspec.UnsetType, TextLogprobs | None]:
    """Text, ids and log-probabilities of a text completion's choice.

    Args:
        sample: of the choice.
        echoed: the request whose prompt comes first; None: no prompt is echoed.
        tokenizer: the model's; None: there is no text, and there are ids.
        offset: characters of the tokens before these.
    """
    prompt_ids = [] if echoed is None else echoed.prompt_token_ids
    text, token_ids = sample.text, msgspec.UNSET
    if text is None:
        token_ids = [*prompt_ids, *sample.token_ids]
    elif echoed is not None:
        assert tokenizer is not None, "a text was made by it"
        text = (decoder_of(tokenizer)(prompt_ids) if echoed.prompt is None else echoed.prompt) + text
    if sample.logprobs is None:
        return text, token_ids, None
    num_visible = sample.num_visible_tokens
    tokens = token_texts([*prompt_ids, *sample.token_ids[:num_visible]], tokenizer)
    logprobs = TextLogprobs(
        tokens=tokens,
        token_logprobs=[*[None] * len(prompt_ids), *sample.logprobs[:num_visible]],
        text_offset=list(accumulate(map(len, tokens), initial=offset))[:-1],
    )
    return text, token_ids, logprobs


def token_texts(token_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The texts of tokens; without a tokenizer they are written like `token_id:7`."""
    text_of = token_text_of(tokenizer)
    texts = ((token_id, text_of(token_id)) for token_id in token_ids)
    return [f"token_id:{token_id}" if text is None else text for token_id, text in texts]


def sample_figures(index: int, sample: CompletionOutput) -> dict[str, Any]:
    """What both kinds of choices tell of a sample that has ended."""
    names = ("finish_reason", "stop_reason", "nfe", "tokens_per_forward", "seed")
    own = {name: getattr(sample, name) for name in names}
    return {"index": index, "completion_tokens": sample.num_visible_tokens, **own}
