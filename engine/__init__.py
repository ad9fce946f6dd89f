"""remask: a serving engine for masked diffusion language models.

What needs a model is imported when first used: `import remask` touches neither torch, Ray nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from remask.outputs import CanvasEvent, CompletionOutput, RequestMetrics, RequestOutput, Trace
from remask.scheduler.errors import (
    EngineDead,
    InvalidRequest,
    Overloaded,
    RemaskError,
    RequestFailed,
    RequestTooLarge,
    Unavailable,
    WorkerDied,
)
from remask.scheduler.params import SamplingParams
from remask.scheduler.policies import MemoryField, RemaskPolicy, UnmaskPolicy
from remask.scheduler.policies import remask as _remask
from remask.scheduler.policies import unmask as _unmask
from remask.scheduler.policies.remask import *  # noqa: F403
from remask.scheduler.policies.unmask import *  # noqa: F403

if TYPE_CHECKING:
    from remask.async_llm import AsyncLLM
    from remask.engine import Engine, Progress
    from remask.llm import LLM
    from remask.options import EngineOptions
    from remask.scoring import Score

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CanvasEvent",
    "CompletionOutput",
    "Engine",
    "EngineDead",
    "EngineOptions",
    "InvalidRequest",
    "MemoryField",
    "Overloaded",
    "Progress",
    "RemaskError",
    "RemaskPolicy",
    "RequestFailed",
    "RequestMetrics",
    "RequestOutput",
    "RequestTooLarge",
    "SamplingParams",
    "Score",
    "Trace",
    "Unavailable",
    "UnmaskPolicy",
    "WorkerDied",
]
__all__ += _remask.__all__
__all__ += _unmask.__all__


_LATE = {
    "LLM": "remask.llm",
    "AsyncLLM": "remask.async_llm",
    "Engine": "remask.engine",
    "EngineOptions": "remask.options",
    "Progress": "remask.engine",
    "Score": "remask.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'remask' has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
