"""What a user gets back, and how it is read off the canvases of a finished request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from remask.scheduler.canvas import REAL, TOKEN, Canvas
from remask.scheduler.request import Request


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a prompt.

    Attributes:
        index: which of the n samples.
        text: the visible text; None without a tokenizer.
        token_ids: the visible tokens, with the end-of-sequence token that ended them; with `ignore_eos` the
            whole canvas.
        finish_reason: "stop" where an end-of-sequence token ended the text, "length" where the canvas did.
        stop_reason: reserved for stop strings and ids; None.
        nfe: model forwards that the sample took.
        tokens_per_forward: visible tokens (before the end-of-sequence token) divided by `nfe`.
        confidences: for each token of `token_ids` the confidence that it was committed with.
        commit_steps: for each token of `token_ids` the forward (from 1) that committed it.
        seed: key of the random numbers.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    nfe: int
    tokens_per_forward: float
    confidences: list[float]
    commit_steps: list[int]
    seed: int

    @property
    def num_visible_tokens(self) -> int:
        """Tokens of `text`: `token_ids` without the end-of-sequence token."""
        return len(self.token_ids) - (self.finish_reason == "stop")


class RequestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a request, in monotonic seconds; `latency` is the difference."""

    arrival_time: float
    finish_time: float
    latency: float


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


def request_output(request: Request, decode: Callable[[list[int]], str] | None) -> RequestOutput:
    """The output of a finished request; `decode` turns visible ids into text."""
    assert request.finish_time is not None, "the request has not finished"
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[_completion(canvas, request.ignore_eos, decode) for canvas in request.canvases],
        finished=True,
        metrics=RequestMetrics(
            arrival_time=request.arrival_time,
            finish_time=request.finish_time,
            latency=request.finish_time - request.arrival_time,
        ),
    )


def _completion(
    canvas: Canvas, ignore_eos: bool, decode: Callable[[list[int]], str] | None
) -> CompletionOutput:
    spec, state = canvas.spec, canvas.state
    tokens = canvas.canvas_tokens()
    ends = np.isin(tokens, spec.stop_ids).nonzero()[0]
    stopped = not ignore_eos and len(ends) > 0
    num_visible = int(ends[0]) if stopped else len(tokens)
    num_returned = num_visible + stopped
    return CompletionOutput(
        index=spec.sample,
        text=decode(tokens[:num_visible].tolist()) if decode is not None else None,
        token_ids=tokens[:num_returned].tolist(),
        finish_reason="stop" if stopped else "length",
        stop_reason=None,
        nfe=state.num_forwards,
        tokens_per_forward=num_visible / state.num_forwards,
        confidences=np.frombuffer(state.confidences, REAL)[:num_returned].tolist(),
        commit_steps=np.frombuffer(state.commit_steps, TOKEN)[:num_returned].tolist(),
        seed=spec.seed,
    )
