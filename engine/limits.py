"""Ceilings for what one call, and all calls together, may ask for: options of the engine, checked before
anything of a call runs."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable

from remask.options import EngineOptions
from remask.scheduler.errors import InvalidRequest, Overloaded
from remask.scheduler.params import ResolvedParams
from remask.scheduler.request import Request
from remask.scheduler.sampling import Reuse

logger = logging.getLogger(__name__)


def check_num_prompts(options: EngineOptions, num_prompts: int) -> None:
    """Raises InvalidRequest for more prompts than a call may have."""
    ceiling = options.max_prompts_per_call
    if ceiling is not None and num_prompts > ceiling:
        fix = f"are more than the engine's max_prompts_per_call; use at most {ceiling} a call"
        raise InvalidRequest("prompts", num_prompts, fix)


def check_params(options: EngineOptions, params: ResolvedParams, num_tokens_before: int = 0) -> int:
    """Checks a request's parameters; returns the tokens of the call's canvases so far.

    Args:
        options: the engine's.
        params: of one prompt.
        num_tokens_before: those of the call's prompts before it.

    Raises:
        InvalidRequest: naming the parameter and the ceiling.
    """
    if options.max_n is not None and params.n > options.max_n:
        raise InvalidRequest("n", params.n, f"is above the engine's max_n; use at most {options.max_n}")
    if options.max_stop_strings is not None and len(params.stop) > options.max_stop_strings:
        fix = f"holds more strings than the engine's max_stop_strings; use at most {options.max_stop_strings}"
        raise InvalidRequest("stop", f"{len(params.stop)} strings", fix)
    longest = max(map(len, params.stop), default=0)
    if options.max_stop_len is not None and longest > options.max_stop_len:
        fix = f"holds a string above the engine's max_stop_len; use at most {options.max_stop_len} characters"
        raise InvalidRequest("stop", f"{longest} characters", fix)
    num_tokens, ceiling = num_tokens_before + params.n * params.max_tokens, options.max_tokens_per_call
    if ceiling is not None and num_tokens > ceiling:
        name, value = ("n", params.n) if params.n > 1 else ("max_tokens", params.max_tokens)
        problem = (
            f"the call asks for {num_tokens} tokens or more, above the engine's max_tokens_per_call "
            f"{ceiling}; use a smaller n or max_tokens, or fewer prompts a call"
        )
        raise InvalidRequest(name, value, problem)
    return num_tokens


def keeps_keys(reuse: Reuse | None, num_rows: int, max_key_rows: int | None) -> bool:
    """Whether a request reuses keys as it asks for; it does not if its keys alone are too many.

    Args:
        reuse: what it asks for.
        num_rows: rows whose keys it would keep.
        max_key_rows: rows whose keys a worker keeps; None: not known yet.

    Raises:
        InvalidRequest: the workers keep no keys.
    """
    if reuse is None or max_key_rows is None:
        return reuse is not None
    if max_key_rows == 0:
        raise InvalidRequest("reuse", reuse, "the workers of this model keep no keys; leave it out")
    if num_rows > max_key_rows:
        problem = "a request of %d rows runs without reuse: max_key_bytes has room for %d"
        logger.warning(problem, num_rows, max_key_rows)
    return num_rows <= max_key_rows


def check_score_size(
    options: EngineOptions, num_samples: int, num_tokens: int, num_tokens_before: int = 0
) -> int:
    """Checks a score as `check_params` a request; its samples are canvases of the continuation's tokens.

    Raises:
        InvalidRequest: naming the parameter and the ceiling.
    """
    if options.max_n is not None and num_samples > options.max_n:
        fix = f"is above the engine's max_n; use at most {options.max_n}"
        raise InvalidRequest("num_samples", num_samples, fix)
    total, ceiling = num_tokens_before + num_samples * num_tokens, options.max_tokens_per_call
    if ceiling is not None and total > ceiling:
        problem = (
            f"the call asks for {total} tokens or more, above the engine's max_tokens_per_call {ceiling}; "
            "use fewer samples, shorter continuations, or fewer prompts a call"
        )
        raise InvalidRequest("num_samples", num_samples, problem)
    return total


class Admission:
    """Counts the requests that have not ended; from any thread.

    Args:
        options: with the ceilings.

    Attributes:
        num_requests: requests that were admitted and not released.
        num_tokens: tokens of their canvases.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self.num_requests = self.num_tokens = 0

    def admit(self, requests: Iterable[Request]) -> None:
        """Counts requests, all or none.

        Raises:
            InvalidRequest: they do not fit even alone.
            Overloaded: they do not fit beside those that have not ended.
        """
        sizes = [request.num_canvas_tokens for request in requests]
        counts = {"requests": len(sizes), "tokens": sum(sizes)}
        for kind, parameter in (("requests", "prompts"), ("tokens", "max_tokens")):
            ceiling = self._ceiling(kind)
            if counts[kind] > ceiling:
                problem = f"above the engine's max_queued_{kind}; a call may have at most {ceiling} {kind}"
                raise InvalidRequest(parameter, counts[kind], problem)
        with self._lock:
            for kind, num_live in (("requests", self.num_requests), ("tokens", self.num_tokens)):
                if num_live + counts[kind] > self._ceiling(kind):
                    raise Overloaded(
                        f"{num_live} {kind} have not ended, and {counts[kind]} more are above the engine's "
                        f"max_queued_{kind} {self._ceiling(kind)}; try again later, or use a smaller call"
                    )
            self.num_requests += len(sizes)
            self.num_tokens += sum(sizes)

    def release(self, request: Request) -> None:
        """Forgets a request that has ended."""
        with self._lock:
            self.num_requests -= 1
            self.num_tokens -= request.num_canvas_tokens

    def _ceiling(self, kind: str) -> float:
        ceiling = getattr(self._options, f"max_queued_{kind}")
        return math.inf if ceiling is None else ceiling
