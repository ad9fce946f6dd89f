"""What of an engine its asynchronous faces use, whether it runs in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from remask.intake import Intake
from remask.scheduler.request import Request
from remask.thread import Listener, Observer


class EngineService(Protocol):
    """Takes requests and reports their progress. `EngineThread` documents the members."""

    intake: Intake
    tokenizer: PreTrainedTokenizerBase | None
    observer: Observer | None

    @property
    def num_live(self) -> int: ...

    @property
    def num_live_tokens(self) -> int: ...

    @property
    def num_workers(self) -> int: ...

    def is_ready(self, seconds: float) -> bool: ...

    def check_alive(self) -> None: ...

    def add(self, requests: Sequence[Request], listener: Listener, *, every_burst: bool = False) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def update_weights(self, weights: Any) -> int: ...

    def scale(self, num_workers: int) -> None: ...

    def close(self, timeout: float | None = None) -> None: ...
