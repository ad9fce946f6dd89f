"""`/tokenize` and `/detokenize`, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from remask.intake import Intake
from remask.openai.bodies import TEMPLATE_ASKS_NOTHING, given_fields, plain_messages
from remask.scheduler.errors import InvalidRequest


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of a prompt, and how the vocabulary writes them if the body asks for it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Text of ids, special tokens included."""

    prompt: str


def tokenize(
    intake: Intake, tokenizer: PreTrainedTokenizerBase | None, body: Any, model_names: Collection[str]
) -> Tokenized:
    """Ids of `prompt`, or of `messages` through the chat template.

    Raises:
        InvalidRequest: the body is invalid, or the model has no tokenizer.
    """
    known = ("prompt", "messages", "add_special_tokens", "return_token_strs")
    fields = given_fields(body, known, model_names, "text to tokenize", TEMPLATE_ASKS_NOTHING)
    is_chat = "messages" in fields
    if ("prompt" in fields) == is_chat:
        raise InvalidRequest("prompt", fields.get("prompt"), "give either prompt or messages")
    adds_special = _flag(fields, "add_special_tokens", not is_chat)
    with_texts = _flag(fields, "return_token_strs", False)
    if is_chat:
        if adds_special:
            raise InvalidRequest(
                "add_special_tokens", True, "is for a prompt; a chat template writes its own"
            )
        prompt = intake.chat_prompt(plain_messages(fields["messages"]))
        assert isinstance(prompt, dict), "of a template"
        ids = prompt["prompt_token_ids"]
    else:
        ids = intake.encode("prompt", fields["prompt"], add_special_tokens=adds_special)
    texts = None
    if with_texts:
        assert tokenizer is not None, "it made the ids"
        texts = [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in ids]
    return Tokenized(count=len(ids), max_model_len=intake.max_len, tokens=ids, token_strs=texts)


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


def _flag(fields: dict[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(name, value, "must be true or false")
    return value
