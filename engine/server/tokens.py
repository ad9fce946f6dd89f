"""`/tokenize` and `/detokenize`, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from remask.intake import Intake
from remask.openai.bodies import given_fields, plain_messages
from remask.scheduler.errors import InvalidRequest


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Text of ids, special tokens included."""

    prompt: str


def tokenize(intake: Intake, body: Any, model_names: Collection[str]) -> Tokenized:
    """Ids of `prompt`, or of `messages` through the chat template.

    Raises:
        InvalidRequest: the body is invalid, or the model has no tokenizer.
    """
    fields = given_fields(body, ("prompt", "add_special_tokens", "messages"), model_names, "text to tokenize")
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest("prompt", fields.get("prompt"), "give either prompt or messages")
    adds = fields.get("add_special_tokens", True)
    if not isinstance(adds, bool):
        raise InvalidRequest("add_special_tokens", adds, "must be true or false")
    if "messages" in fields:
        prompt = intake.chat_prompt(plain_messages(fields["messages"]))
        assert isinstance(prompt, dict), "of a template"
        ids = prompt["prompt_token_ids"]
    else:
        ids = intake.encode("prompt", fields["prompt"], add_special_tokens=adds)
    return Tokenized(count=len(ids), max_model_len=intake.max_len, tokens=ids)


def detokenize(
    intake: Intake, tokenizer: PreTrainedTokenizerBase | None, body: Any, model_names: Collection[str]
) -> Detokenized:
    """Text of `tokens`.

    Raises:
        InvalidRequest: the body is invalid, or the model has no tokenizer.
    """
    ids = given_fields(body, ("tokens",), model_names, "text to detokenize").get("tokens")
    if tokenizer is None:
        raise InvalidRequest("tokens", ids, "the model has no tokenizer")
    if not isinstance(ids, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise InvalidRequest("tokens", ids, "must be a list of token ids")
    last = intake.config.vocab_size - 1
    if outside := [i for i in ids if not 0 <= i <= last]:
        raise InvalidRequest("tokens", outside[0], f"is outside the vocabulary 0..{last}")
    return Detokenized(prompt=str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
