"""Streams: what of a request can be shown while it runs.

A finished block never changes, so its tokens are *stable*. Of their text a stream shows what no later token
can change. It holds back characters in which a stop string may begin, and an incomplete character at the end.
What is held back comes with the last output of the sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import msgspec
from transformers import PreTrainedTokenizerBase

from remask.engine import Progress
from remask.outputs import CanvasEvent, CompletionOutput, Decode, RequestOutput, metrics, running
from remask.scheduler.canvas import Canvas
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.request import Request
from remask.text import stable_decoder_of, token_text_of

OutputKind: TypeAlias = Literal["final_only", "cumulative", "delta"]
TokenText: TypeAlias = Callable[[int], str | None]


def check_kind(kind: str, canvas_events: bool) -> None:
    """Raises InvalidRequest if a stream of this kind cannot be."""
    if kind not in get_args(OutputKind):
        raise InvalidRequest("output_kind", kind, f"use {', '.join(get_args(OutputKind))}")
    if not isinstance(canvas_events, bool):
        raise InvalidRequest("canvas_events", canvas_events, "must be true or false")
    if canvas_events and kind == "final_only":
        raise InvalidRequest("canvas_events", canvas_events, "is for output_kind 'cumulative' or 'delta'")


class OutputStream:
    """The outputs of a request, from its progress.

    Args:
        request: the request; nothing of it has run.
        kind: "cumulative" (all that is stable) or "delta" (what is new).
        stop: its stop strings.
        tokenizer: of the model; None: there are no texts.
        canvas_events: whether outputs have the events of their canvases.
    """

    def __init__(
        self,
        request: Request,
        kind: OutputKind,
        stop: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        canvas_events: bool,
    ) -> None:
        self._request, self._is_delta = request, kind == "delta"
        if canvas_events:
            request.record_events()
        num_held = max(map(len, stop), default=1) - 1
        decode = None if tokenizer is None else stable_decoder_of(tokenizer, num_held)
        token_text = token_text_of(tokenizer) if canvas_events else None
        self._samples = [_Sample(canvas, request, decode, token_text) for canvas in request.canvases]

    def update(self, heard: Sequence[Progress]) -> RequestOutput | None:
        """The output after some progress, in order; None if there is nothing new. Samples are those that have
        something new; the last cumulative output has all of them."""
        by_sample: dict[int, list[Progress]] = {}
        for progress in heard:
            by_sample.setdefault(progress.sample, []).append(progress)
        new = {
            sample: output
            for sample, own in by_sample.items()
            if (output := self._samples[sample].update(own, is_delta=self._is_delta)) is not None
        }
        if (ended := heard[-1].output) is not None and not self._is_delta:
            return msgspec.structs.replace(ended, outputs=[new.get(own.index, own) for own in ended.outputs])
        if ended is None and not new:
            return None
        return RequestOutput(
            request_id=self._request.request_id,
            prompt=self._request.prompt,
            prompt_token_ids=self._request.prompt_token_ids,
            outputs=[new[sample] for sample in sorted(new)],
            finished=ended is not None,
            metrics=ended.metrics if ended is not None else metrics(self._request, time.monotonic()),
            weights_version=self._request.weights_version,
        )


class _Sample:
    """One sample of a stream: what of it was stable and was shown."""

    def __init__(
        self, canvas: Canvas, request: Request, decode: Decode | None, token_text: TokenText | None
    ) -> None:
        self._spec, self._request = canvas.spec, request
        self._decode, self._token_text = decode, token_text
        self._num_tokens, self._text = 0, ""

    def update(self, heard: Sequence[Progress], *, is_delta: bool) -> CompletionOutput | None:
        """The sample after some progress; None if there is nothing new."""
        last, events = heard[-1], self._events(heard)
        if last.completion is None and last.num_stable_tokens == self._num_tokens and not events:
            return None
        num_shown, shown = self._num_tokens, self._text
        output = last.completion or self._running(last)
        self._num_tokens, self._text = len(output.token_ids), output.text or ""
        output = msgspec.structs.replace(output, canvas_events=events)
        return _behind(output, num_shown, len(shown)) if is_delta else output

    def _running(self, progress: Progress) -> CompletionOutput:
        """The sample with its stable tokens and text."""
        num_tokens, text = progress.num_stable_tokens, None if self._decode is None else self._text
        if self._decode is not None and num_tokens > self._num_tokens:
            text = self._decode(self._spec.canvas_tokens(progress.state)[:num_tokens].tolist())
        return running(self._spec, progress.state, self._request, num_tokens, text)

    def _events(self, heard: Sequence[Progress]) -> list[CanvasEvent] | None:
        if (text := self._token_text) is None:
            return None
        return [
            CanvasEvent(
                step=step,
                position=position,
                token=token,
                text=text(token),
                is_commit=is_commit,
                confidence=confidence,
            )
            for progress in heard
            if (trace := progress.events) is not None
            for step, position, token, is_commit, confidence in zip(
                trace.step, trace.position, trace.token, trace.is_commit, trace.confidence, strict=True
            )
        ]


def _behind(output: CompletionOutput, num_tokens: int, num_characters: int) -> CompletionOutput:
    """What of a sample stands behind its first tokens and characters."""
    return msgspec.structs.replace(
        output,
        text=None if output.text is None else output.text[num_characters:],
        token_ids=output.token_ids[num_tokens:],
        confidences=output.confidences[num_tokens:],
        commit_steps=output.commit_steps[num_tokens:],
        logprobs=None if output.logprobs is None else output.logprobs[num_tokens:],
    )
