"""The tokenizer: encoding of prompts, chat templates and stop strings.

A prompt never contains the mask token: its text in a prompt is encoded as plain characters. The text of a
completion never contains special tokens, so a stop string that is one becomes a stop id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from remask.byte_pairs import byte_pair_tokenizer
from remask.scheduler.errors import InvalidRequest
from remask.stops import UNREADABLE

MAX_REASON_LEN = 200  # characters of what a chat template says


def load_tokenizer(directory: Path, required: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory, never looked up online; None if there is none.

    It is read from `tokenizer.json`, or from `vocab.json` and `merges.txt` as published with Dream and
    DiffuCoder. No code of a checkpoint runs.

    Raises:
        InvalidRequest: it cannot be read, or is missing and required.
    """
    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return byte_pair_tokenizer(directory)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise InvalidRequest("tokenizer", str(directory), f"cannot be read: {error}") from None
    if required:
        problem = "holds no tokenizer.json, nor vocab.json and merges.txt"
        raise InvalidRequest("tokenizer", str(directory), problem)
    return None


class PromptEncoder:
    """Encodes prompts, from any thread.

    The ids of the mask token's text as plain characters are computed once, because splitting special tokens
    is a setting of the tokenizer that all threads share.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_id: int) -> None:
        self._tokenizer, self._mask_id = tokenizer, mask_id
        self._mask = str(tokenizer.decode([mask_id]))
        self._mask_as_text = tokenizer.encode(self._mask, add_special_tokens=False, split_special_tokens=True)
        tokenizer.encode("", add_special_tokens=False)  # which takes the setting back

    def encode(self, text: str, *, add_special_tokens: bool, name: str = "prompt") -> list[int]:
        """Ids of a prompt, or of what errors call `name`. The mask token's text is encoded as plain
        characters.

        Raises:
            InvalidRequest: the text is not valid Unicode, or the tokenizer has no other ids for the mask's
                characters.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest(name, text, "is not valid Unicode; give UTF-8 text") from None
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if self._mask_id not in ids:
            return ids
        if self._mask_id in self._mask_as_text:
            problem = f"holds the mask token {self._mask!r}, which a canvas alone may hold; leave it out"
            raise InvalidRequest(name, text, problem)
        return [i for own in ids for i in (self._mask_as_text if own == self._mask_id else (own,))]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, Any]], *, name: str
) -> str:
    """Applies the tokenizer's chat template to a conversation, with the prompt for the assistant's turn.

    Args:
        tokenizer: has a chat template, which is code of the checkpoint and may raise any error.
        conversation: messages with text content.
        name: name of the conversation in errors.

    Raises:
        InvalidRequest: the template fails or rejects the conversation.
    """
    try:
        return str(
            tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        problem = f"the chat template refuses it: {_one_line(error)}"
    except Exception as error:
        problem = f"the tokenizer's chat template fails: {type(error).__name__}: {_one_line(error)}"
    raise InvalidRequest(name, conversation, problem)


def content_text(name: str, content: object) -> str:
    """The text of a message: text, or OpenAI's content parts joined by line breaks.

    Args:
        name: name of the content in errors.
        content: text, or a list of `{"type": "text", "text": ...}`.

    Raises:
        InvalidRequest: the content is not text.
    """
    if isinstance(content, list):
        return "\n".join(_part_text(f"{name}[{place}]", part) for place, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest(name, content, "must be text, or a list of text parts")
    return content


def text_messages(name: str, conversation: object) -> list[dict[str, Any]]:
    """Messages whose content is text; `name` is what errors call the conversation.

    Raises:
        InvalidRequest: a message has no text role or content.
    """
    if not isinstance(conversation, list) or not conversation:
        raise InvalidRequest(name, conversation, "must be a list of at least one message")
    for place, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{name}[{place}]", message, "must have a text `role` and a text `content`")
        content = content_text(f"{name}[{place}].content", message.get("content"))
        conversation[place] = {**message, "content": content}
    return conversation


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Text as the tokens write it, without special tokens. More tokens only add to it, so that a stop string
    stays where it is."""
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def token_text_of(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[int], str | None]:
    """The texts of single tokens, of special ones too; None without a tokenizer."""
    if tokenizer is None:
        return lambda _: None
    return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def stable_decoder_of(tokenizer: PreTrainedTokenizerBase, num_held: int) -> Callable[[list[int]], str]:
    """Text of the first tokens of a completion that no later token can change, less `num_held` characters.

    An incomplete character at the end may change. So may a run of the tokens `<0x00>` to `<0xFF>`, by which
    tokenizers with byte fallback write what they have no token for: it is decoded as a whole.
    """
    decode = decoder_of(tokenizer)
    without = (None, tokenizer.unk_token_id)
    has_bytes = tokenizer.convert_tokens_to_ids("<0x00>") not in without  # all of them or none, so look once
    ids = (tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256 * has_bytes))
    byte_ids = {own for own in ids if isinstance(own, int) and own not in without}

    def belongs_to_run(token: int) -> bool:
        return token in byte_ids or not decode([token])  # tokens without text do not end a run

    def stable(tokens: list[int]) -> str:
        if byte_ids:
            run = takewhile(belongs_to_run, reversed(tokens))
            tokens = tokens[: len(tokens) - len(list(run))]
        text = decode(tokens).rstrip(UNREADABLE)
        return text[: max(0, len(text) - num_held)]

    return stable


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the special tokens, which decoding omits, by their text."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in added if token.special and token.content}


def split_stops(
    strings: Sequence[str], special: dict[str, int], *, mask_id: int
) -> tuple[list[str], list[int]]:
    """Separates stop strings into those of plain text and the ids of those that are a special token.

    Args:
        strings: the stop strings.
        special: see `special_tokens`.
        mask_id: id of the mask token, which no text contains.

    Raises:
        InvalidRequest: a string that no text can contain: the mask token, or a special token amid other text.
    """
    texts = [string for string in strings if string not in special]
    ids = [special[string] for string in strings if string in special]
    if mask_id in ids:
        problem = "holds the mask token, which no text holds; leave it out"
        raise InvalidRequest("stop", list(strings), problem)
    for text in texts:
        inside = next((token for token in special if token in text), None)
        if inside is not None:
            problem = f"holds the special token {inside!r}, which no text shows; use stop_token_ids"
            raise InvalidRequest("stop", text, f"{problem} [{special[inside]}]")
    return texts, ids


def _part_text(name: str, part: object) -> str:
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
        raise InvalidRequest(name, part, 'must be {"type": "text", "text": ...}; the model reads text alone')
    return given["text"]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON_LEN else text[: MAX_REASON_LEN - 3] + "..."
