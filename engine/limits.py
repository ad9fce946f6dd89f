"""Ceilings for what one call, and all calls together, may ask for: options of the engine, checked before
anything of a call runs."""

from __future__ import annotations

from typing import Any

import msgspec

from remask.scheduler.errors import InvalidRequest, Overloaded
from remask.scheduler.params import ResolvedParams


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ceilings; None: there is none."""

    max_prompts_per_call: int | None = None
    max_tokens_per_call: int | None = None  # the canvases of a call together: n x max_tokens of every prompt
    max_n: int | None = 1024
    max_stop_strings: int | None = 16  # of a request; equal ones count once
    max_stop_len: int | None = 256  # characters of each
    max_queued_requests: int | None = None  # that have not ended, of all calls together
    max_queued_tokens: int | None = None  # of their canvases

    @classmethod
    def of(cls, **options: Any) -> Limits:
        """Ceilings from options of the engine.

        Raises:
            InvalidRequest: an option is neither None nor a positive integer; it is named.
        """
        for name, value in options.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidRequest(name, value, "must be a positive integer, or None for no ceiling")
        return cls(**options)

    def check_num_prompts(self, num_prompts: int) -> None:
        """Raises InvalidRequest for more prompts than a call may have."""
        ceiling = self.max_prompts_per_call
        if ceiling is not None and num_prompts > ceiling:
            fix = f"are more than the engine's max_prompts_per_call; use at most {ceiling} a call"
            raise InvalidRequest("prompts", num_prompts, fix)

    def check_live(self, *, num_requests: int, num_tokens: int, more: tuple[int, int]) -> None:
        """Raises Overloaded if `more`, requests and tokens of their canvases, do not fit beside the live."""
        for name, num_live, num_more, ceiling in (
            ("max_queued_requests", num_requests, more[0], self.max_queued_requests),
            ("max_queued_tokens", num_tokens, more[1], self.max_queued_tokens),
        ):
            if ceiling is not None and num_live + num_more > ceiling:
                kind = name.removeprefix("max_queued_")
                raise Overloaded(
                    f"{num_live} {kind} have not ended, and {num_more} more are above the engine's {name} "
                    f"{ceiling}; try again later, or use a smaller call"
                )

    def check(self, params: ResolvedParams, num_tokens_before: int = 0) -> int:
        """Checks a request's parameters; returns the tokens of the call's canvases so far.

        Args:
            params: of one prompt.
            num_tokens_before: those of the call's prompts before it.

        Raises:
            InvalidRequest: naming the parameter and the ceiling.
        """
        if self.max_n is not None and params.n > self.max_n:
            raise InvalidRequest("n", params.n, f"is above the engine's max_n; use at most {self.max_n}")
        if self.max_stop_strings is not None and len(params.stop) > self.max_stop_strings:
            fix = (
                f"holds more strings than the engine's max_stop_strings; use at most {self.max_stop_strings}"
            )
            raise InvalidRequest("stop", f"{len(params.stop)} strings", fix)
        longest = max(map(len, params.stop), default=0)
        if self.max_stop_len is not None and longest > self.max_stop_len:
            fix = (
                f"holds a string above the engine's max_stop_len; use at most {self.max_stop_len} characters"
            )
            raise InvalidRequest("stop", f"{longest} characters", fix)
        num_tokens, ceiling = num_tokens_before + params.n * params.max_tokens, self.max_tokens_per_call
        if ceiling is not None and num_tokens > ceiling:
            name, value = ("n", params.n) if params.n > 1 else ("max_tokens", params.max_tokens)
            problem = (
                f"the call asks for {num_tokens} tokens or more, above the engine's max_tokens_per_call "
                f"{ceiling}; use a smaller n or max_tokens, or fewer prompts a call"
            )
            raise InvalidRequest(name, value, problem)
        return num_tokens
