"""What a user gets back, and how it is read off the canvases of a finished request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from remask.scheduler.canvas import EVENT, REAL, TOKEN, Canvas, CanvasSpec
from remask.scheduler.request import Request


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a canvas: an entry for each event in all of the lists, by step, then by position.

    Attributes:
        step: the forward, counted from 1.
        position: which slot of the canvas, counted from 0.
        block: the slot's block.
        token: the token committed, or the one removed.
        is_commit: committed; else remasked.
        confidence: of a commit. Of a remasking what the policy held against the token: its leave-one-out
            probability (`wino`, `oracle_loo`), its probability at its own row (`low_prob`, `saber`), or the
            confidence that it was committed with.
        canvas_len: slots of the canvas; those behind an end of text may be empty.
    """

    step: list[int]
    position: list[int]
    block: list[int]
    token: list[int]
    is_commit: list[bool]
    confidence: list[float]
    canvas_len: int


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a prompt.

    Attributes:
        index: which of the n samples.
        text: the visible text; None without a tokenizer.
        token_ids: the visible tokens, with the end-of-sequence token or stop id that ended them; with a stop
            string up to the token that completes it; with `ignore_eos` and no other stop the whole canvas.
        finish_reason: "stop" where an end-of-sequence token, a stop id or a stop string ended the text,
            "length" where the canvas did, "error" if the request failed (`RequestOutput.error`): then the
            tokens are those before the first that is missing.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended the text; None for the model's
            own end-of-sequence tokens and where nothing did.
        nfe: model forwards that the sample took.
        tokens_per_forward: visible tokens (without an id that ended them; those of a stop string were written
            and count) divided by `nfe`.
        confidences: for each token of `token_ids` the confidence that it was committed with.
        commit_steps: for each token of `token_ids` the forward (from 1) that committed it.
        seed: key of the random numbers.
        logprobs: for each token of `token_ids` its log-probability at its commit, of the whole, untempered
            softmax; None where not asked for.
        cumulative_logprob: their sum.
        trace: all commits and remaskings; None where not asked for.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "error"]
    stop_reason: int | str | None
    nfe: int
    tokens_per_forward: float
    confidences: list[float]
    commit_steps: list[int]
    seed: int
    logprobs: list[float] | None = None
    cumulative_logprob: float | None = None
    trace: Trace | None = None

    @property
    def num_visible_tokens(self) -> int:
        """`token_ids` without the id that ended them."""
        return len(self.token_ids) - (self.finish_reason == "stop" and not isinstance(self.stop_reason, str))


class RequestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a request, in monotonic seconds; `latency` is the difference."""

    arrival_time: float
    finish_time: float
    latency: float


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended.

    Attributes:
        error: why it could not finish; None if it has finished.
        error_type: the class of that error; None if it has finished.
        error_status: the class's HTTP status; None if it has finished.
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


def request_output(request: Request, decode: Callable[[list[int]], str] | None) -> RequestOutput:
    """The output of a finished request; `decode` turns visible ids into text."""
    assert request.finish_time is not None, "the request has not finished"
    failure = request.failure
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[_completion(canvas, request, decode) for canvas in request.canvases],
        finished=failure is None,
        error=request.error,
        error_type=type(failure).__name__ if failure is not None else None,
        error_status=failure.status if failure is not None else None,
        metrics=RequestMetrics(
            arrival_time=request.arrival_time,
            finish_time=request.finish_time,
            latency=request.finish_time - request.arrival_time,
        ),
    )


def _completion(
    canvas: Canvas, request: Request, decode: Callable[[list[int]], str] | None
) -> CompletionOutput:
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
    logprobs = np.frombuffer(state.logprobs, REAL)[:num_returned].tolist() if request.logprobs else None
    return CompletionOutput(
        index=spec.sample,
        text=text,
        token_ids=tokens[:num_returned].tolist(),
        finish_reason="stop" if stopped else "length" if state.finished else "error",
        stop_reason=stop_reason,
        nfe=state.num_forwards,
        tokens_per_forward=num_visible / max(1, state.num_forwards),
        confidences=np.frombuffer(state.confidences, REAL)[:num_returned].tolist(),
        commit_steps=np.frombuffer(state.commit_steps, TOKEN)[:num_returned].tolist(),
        seed=spec.seed,
        logprobs=logprobs,
        cumulative_logprob=sum(logprobs) if logprobs is not None else None,
        trace=trace_of(spec, b"".join(canvas.events)) if spec.trace else None,
    )


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
        canvas_len=spec.canvas_len,
    )
