"""The outputs of requests, and how they are made from finished canvases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from remask.scheduler.canvas import EVENT, REAL, TOKEN, Canvas, CanvasSpec, CanvasState
from remask.scheduler.request import Request

Decode: TypeAlias = Callable[[list[int]], str]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The events of a canvas. Each list has an entry per event, ordered by step and then by position.

    Attributes:
        step: Forward, counted from 1.
        position: Slot of the canvas, counted from 0.
        block: Block of the slot.
        token: Committed or removed token.
        is_commit: True for a commit, False for a remasking.
        confidence: For a commit, its confidence. For a remasking, the score that triggered it: the token's
            leave-one-out probability (`wino`, `oracle_loo`), its probability at its own row (`low_prob`,
            `saber`), or the confidence at its commit.
        is_top: Whether a commit is that of the most probable token. False for a remasking.
        canvas_len: Slots of the canvas. Slots behind an end of text may be empty.
    """

    step: list[int]
    position: list[int]
    block: list[int]
    token: list[int]
    is_commit: list[bool]
    confidence: list[float]
    is_top: list[bool]
    canvas_len: int


class CanvasEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A commit or a remasking of a stream. The token may be removed, and another one committed, until the
    block of its slot is finished.

    Attributes:
        step: Forward, counted from 1.
        position: Slot of the canvas, counted from 0.
        token: Committed or removed token.
        text: Text of the token. None without a tokenizer.
        is_commit: True for a commit, False for a remasking.
        confidence: See `Trace`.
    """

    step: int
    position: int
    token: int
    text: str | None
    is_commit: bool
    confidence: float


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a prompt.

    Attributes:
        index: Index of the sample, below `n`.
        text: Visible text. None without a tokenizer.
        token_ids: Visible tokens, with the end-of-sequence token or stop id that ended them. A stop string
            ends them at the token that completes it. With `ignore_eos` and no other stop, the whole canvas.
        finish_reason: "stop" if an end-of-sequence token, a stop id or a stop string ended the text, "length"
            if the canvas did, "error" if the request failed (`RequestOutput.error`). After an error the
            tokens are those before the first missing one. None in a stream, while the sample runs.
        stop_reason: Stop string, or id of `stop_token_ids`, that ended the text. None for the model's own
            end-of-sequence tokens and if the canvas ended the text.
        nfe: Number of model forwards of the sample.
        num_full_forwards: Number of these forwards that reuse no keys.
        num_query_rows: Rows of these forwards: prompt and canvas, or the rows that a forward with reused keys
            computes; twice with guidance. `wino` adds a row for each slot of the block, `oracle_loo` the
            whole sequence for each committed slot of the block. A forward may compute fewer.
        tokens_per_forward: Visible tokens divided by `nfe`. An id that ended the text does not count; tokens
            of a stop string do.
        confidences: Confidence of each token of `token_ids` at its commit.
        commit_steps: Forward (from 1) that committed each token of `token_ids`.
        seed: Random seed.
        logprobs: Log-probability of each token of `token_ids` at its commit, of the whole, untempered
            softmax. None if not requested.
        cumulative_logprob: Sum of `logprobs`.
        trace: All commits and remaskings. None if not requested.
        canvas_events: In a stream, what was committed and removed since the last output, in order. None if
            not requested.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "error"] | None
    stop_reason: int | str | None
    nfe: int
    num_full_forwards: int
    num_query_rows: int
    tokens_per_forward: float
    confidences: list[float]
    commit_steps: list[int]
    seed: int
    logprobs: list[float] | None = None
    cumulative_logprob: float | None = None
    trace: Trace | None = None
    canvas_events: list[CanvasEvent] | None = None

    @property
    def num_visible_tokens(self) -> int:
        """Number of `token_ids` without the id that ended them."""
        return len(self.token_ids) - (self.finish_reason == "stop" and not isinstance(self.stop_reason, str))


class RequestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a request, in monotonic seconds; `latency` is the difference. While a request runs,
    `finish_time` is the time of the output."""

    arrival_time: float
    finish_time: float
    latency: float


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The output of a request that has ended or, in a stream, of one that runs.

    Attributes:
        outputs: A sample each. In a stream those that are new; see `AsyncLLM.generate`.
        finished: The request has finished, without an error.
        error: Message of the error that ended the request. None if it has finished.
        error_type: Class of that error. None if the request has finished.
        error_status: HTTP status of that class. None if the request has finished.
        weights_version: Version of the weights that wrote it, all samples: 0, and one more after each
            `update_weights`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    error: str | None = None
    error_type: str | None = None
    error_status: int | None = None
    weights_version: int = 0


def request_output(request: Request, decode: Decode | None) -> RequestOutput:
    """The output of a finished request; `decode` turns visible ids into text."""
    assert request.finish_time is not None, "the request has not finished"
    failure = request.failure
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion(canvas, request, decode) for canvas in request.canvases],
        finished=failure is None,
        error=request.error,
        error_type=type(failure).__name__ if failure is not None else None,
        error_status=failure.status if failure is not None else None,
        metrics=metrics(request, request.finish_time),
        weights_version=request.weights_version,
    )


def metrics(request: Request, now: float) -> RequestMetrics:
    """Times of a request at a moment, in monotonic seconds."""
    arrival = request.arrival_time
    return RequestMetrics(arrival_time=arrival, finish_time=now, latency=now - arrival)


def completion(canvas: Canvas, request: Request, decode: Decode | None) -> CompletionOutput:
    """A sample that has ended."""
    spec, state = canvas.spec, canvas.state
    tokens = spec.canvas_tokens(state)
    num_visible = num_returned = num_shown = len(tokens)
    stop_reason: int | str | None = None
    if canvas.text_stop is not None:
        num_visible = num_returned = num_shown = canvas.text_stop.num_tokens
        stop_reason = canvas.text_stop.string
    elif not state.finished:
        missing = np.frombuffer(state.commit_steps, TOKEN) == 0
        num_visible = num_returned = num_shown = int(missing.argmax()) if missing.any() else len(tokens)
    elif (stop := spec.first_stop(tokens)) is not None:
        num_visible = stop
        num_returned = num_visible + 1
        end_id = int(tokens[num_visible])
        stop_reason = end_id if end_id in request.stop_token_ids else None
        num_shown = num_returned if request.include_stop_in_text else num_visible
    text = decode(tokens[:num_shown].tolist()) if decode is not None else None
    if text is not None and isinstance(stop_reason, str):
        end = text.index(stop_reason)
        text = text[: end + len(stop_reason) if request.include_stop_in_text else end]
    stopped = num_returned > num_visible or isinstance(stop_reason, str)
    return CompletionOutput(
        text=text,
        finish_reason="stop" if stopped else "length" if state.finished else "error",
        stop_reason=stop_reason,
        trace=trace_of(spec, b"".join(canvas.events)) if request.trace else None,
        **_figures(spec, state, request, num_visible, num_returned),
    )


def running(
    spec: CanvasSpec, state: CanvasState, request: Request, num_tokens: int, text: str | None
) -> CompletionOutput:
    """A sample that runs, with its first tokens and their text."""
    figures = _figures(spec, state, request, num_tokens, num_tokens)
    return CompletionOutput(text=text, finish_reason=None, stop_reason=None, **figures)


def _figures(
    spec: CanvasSpec, state: CanvasState, request: Request, num_visible: int, num_returned: int
) -> dict[str, Any]:
    """Tokens of a sample and what belongs to them."""
    logprobs = np.frombuffer(state.logprobs, REAL)[:num_returned].tolist() if request.logprobs else None
    return {
        "index": spec.sample,
        "token_ids": spec.canvas_tokens(state)[:num_returned].tolist(),
        "nfe": state.num_forwards,
        "num_full_forwards": state.num_forwards if spec.reuse is None else state.num_full_forwards,
        "num_query_rows": state.num_query_rows,
        "tokens_per_forward": num_visible / max(1, state.num_forwards),
        "confidences": np.frombuffer(state.confidences, REAL)[:num_returned].tolist(),
        "commit_steps": np.frombuffer(state.commit_steps, TOKEN)[:num_returned].tolist(),
        "seed": spec.seed,
        "logprobs": logprobs,
        "cumulative_logprob": sum(logprobs) if logprobs is not None else None,
    }


def trace_of(spec: CanvasSpec, records: bytes) -> Trace:
    """EVENT records of a canvas as lists."""
    events = np.frombuffer(records, EVENT)
    return Trace(
        step=events["step"].tolist(),
        position=events["slot"].tolist(),
        block=(events["slot"] // spec.block_length).tolist(),
        token=events["token"].tolist(),
        is_commit=(events["is_commit"] > 0).tolist(),
        confidence=events["confidence"].tolist(),
        is_top=(events["is_top"] > 0).tolist(),
        canvas_len=spec.canvas_len,
    )
