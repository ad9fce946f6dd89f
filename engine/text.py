"""Conversations as text: message parts and chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from remask.scheduler.errors import InvalidRequest

MAX_REASON_LEN = 200  # characters of what a chat template says


def render_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, Any]], *, name: str
) -> str:
    """A conversation through the tokenizer's chat template, ready for the assistant's turn.

    Args:
        tokenizer: with a chat template; templates are code of the checkpoint and may fail in any way.
        conversation: messages with text content.
        name: what an error calls the conversation.

    Raises:
        InvalidRequest: the template fails, or says that it does not take the conversation.
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
    """The text of a message: text as it is, or OpenAI's parts, each a line.

    Args:
        name: what errors call the message's content.
        content: text, or a list of `{"type": "text", "text": ...}`.

    Raises:
        InvalidRequest: something else than text.
    """
    if isinstance(content, list):
        return "\n".join(_part_text(f"{name}[{place}]", part) for place, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest(name, content, "must be text, or a list of text parts")
    return content


def _part_text(name: str, part: object) -> str:
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
        raise InvalidRequest(name, part, 'must be {"type": "text", "text": ...}; the model reads text alone')
    return given["text"]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON_LEN else text[: MAX_REASON_LEN - 3] + "..."
