"""OpenAI's chunks of a stream, one for each sample that has something new.

A chunk of a sample that has ended has the fields of a choice of a whole response. With `canvas` a chunk has,
beside the text, what was committed and removed since the last one.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from transformers import PreTrainedTokenizerBase

from remask.openai.bodies import StreamOptions
from remask.openai.responses import (
    ChatLogprobs,
    TextLogprobs,
    Usage,
    chat_logprobs,
    sample_figures,
    text_parts,
    usage_of,
)
from remask.outputs import CanvasEvent, CompletionOutput, RequestOutput


class CanvasChunk(msgspec.Struct, frozen=True, kw_only=True):
    """What was committed and removed on a canvas, in order; a token may be removed until its block is
    finished."""

    length: int  # slots of the canvas
    block_length: int
    nfe: int  # forwards so far
    events: list[CanvasEvent]


class _ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both kinds of choices; those with a default are set when the sample has ended."""

    index: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    completion_tokens: int | UnsetType = UNSET
    nfe: int | UnsetType = UNSET
    tokens_per_forward: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    canvas: CanvasChunk | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of the assistant's message; the role is sent once."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | None


class ChatChunkChoice(_ChunkChoice, frozen=True, kw_only=True):
    """What is new of a sample of a chat."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class TextChunkChoice(_ChunkChoice, frozen=True, kw_only=True):
    """What is new of a sample of a text completion."""

    text: str | None
    token_ids: list[int] | UnsetType = UNSET
    logprobs: TextLogprobs | None


Choice = TypeVar("Choice", ChatChunkChoice, TextChunkChoice)


class Chunk(msgspec.Struct, Generic[Choice], frozen=True, kw_only=True):
    """A `chat.completion.chunk`, or a `text_completion` of a stream."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int  # Unix seconds
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET  # null before the last chunk, if it was asked for


class ChunkWriter:
    """The chunks of one response.

    Args:
        kind: the endpoint.
        tokenizer: the model's; None: chunks have token ids in place of text.
        n: samples of a prompt.
        canvas: length and block length of the canvases.
        echo: the text of a text completion begins with the prompt.
        options: what the chunks hold beside the text.
        about: id, time and model of the response.
    """

    def __init__(
        self,
        kind: Literal["chat", "completion"],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        n: int,
        canvas: tuple[int, int],
        echo: bool,
        options: StreamOptions,
        about: dict[str, Any],
    ) -> None:
        self._kind, self._tokenizer, self._n = kind, tokenizer, n
        self._canvas, self._echo, self._options = canvas, echo, options
        self._common = {
            "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
            "usage": None if options.include_usage else UNSET,
            **about,
        }
        self._prompts: dict[int, RequestOutput] = {}
        self._num_visible: dict[int, int] = {}  # tokens of each choice that was begun
        self._num_characters: dict[int, int] = {}  # of the texts of these tokens

    def chunks(self, place: int, output: RequestOutput) -> list[Chunk[Any]]:
        """The chunks for a delta of the prompt with this place."""
        self._prompts[place] = output
        choices = [self._choice(place * self._n + sample.index, output, sample) for sample in output.outputs]
        common = self._common
        if self._options.continuous_usage_stats:
            common = {**common, "usage": self._usage()}
        return [Chunk(choices=[choice], **common) for choice in choices]

    def last(self) -> list[Chunk[Any]]:
        """The chunk with the usage of all that was written, if it was asked for."""
        if not self._options.include_usage:
            return []
        return [Chunk(choices=[], **{**self._common, "usage": self._usage()})]

    def _usage(self) -> Usage:
        return usage_of(self._prompts.values(), sum(self._num_visible.values()))

    def _choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput
    ) -> ChatChunkChoice | TextChunkChoice:
        is_first = index not in self._num_visible
        num_visible = self._num_visible.get(index, 0) + sample.num_visible_tokens
        self._num_visible[index] = num_visible
        figures: dict[str, Any] = {"index": index}
        if sample.finish_reason is not None:
            figures = {**sample_figures(index, sample), "completion_tokens": num_visible}
        if sample.canvas_events is not None:
            length, block_length = self._canvas
            figures["canvas"] = CanvasChunk(
                length=length, block_length=block_length, nfe=sample.nfe, events=sample.canvas_events
            )
        if self._kind == "chat":
            delta = ChatDelta(role="assistant" if is_first else UNSET, content=sample.text)
            return ChatChunkChoice(delta=delta, logprobs=chat_logprobs(sample, self._tokenizer), **figures)
        echoed = output if is_first and self._echo else None
        offset = self._num_characters.get(index, 0)
        text, token_ids, logprobs = text_parts(sample, echoed, self._tokenizer, offset)
        if logprobs is not None:
            self._num_characters[index] = offset + sum(map(len, logprobs.tokens))
        return TextChunkChoice(text=text, token_ids=token_ids, logprobs=logprobs, **figures)
