"""remask: a serving engine for masked diffusion language models.

What needs a model is imported when first used: `import remask` touches neither torch, Ray nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from remask.outputs import CompletionOutput, RequestMetrics, RequestOutput, Trace
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
from remask.scheduler.policies import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    LowProb,
    MemoryField,
    OracleLoo,
    RandomRemask,
    Rcr,
    RemaskPolicy,
    Remdm,
    Saber,
    Schedule,
    Threshold,
    UnmaskPolicy,
    Wino,
)

if TYPE_CHECKING:
    from remask.async_llm import AsyncLLM
    from remask.engine import Engine, Progress
    from remask.llm import LLM
    from remask.options import EngineOptions

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Bernoulli",
    "CappedThreshold",
    "CompletionOutput",
    "Dream",
    "Engine",
    "EngineDead",
    "EngineOptions",
    "EntropyBound",
    "Factor",
    "InvalidRequest",
    "LowProb",
    "MemoryField",
    "OracleLoo",
    "Overloaded",
    "Progress",
    "RandomRemask",
    "Rcr",
    "RemaskError",
    "RemaskPolicy",
    "Remdm",
    "RequestFailed",
    "RequestMetrics",
    "RequestOutput",
    "RequestTooLarge",
    "Saber",
    "SamplingParams",
    "Schedule",
    "Threshold",
    "Trace",
    "Unavailable",
    "UnmaskPolicy",
    "Wino",
    "WorkerDied",
]


_LATE = {
    "LLM": "remask.llm",
    "AsyncLLM": "remask.async_llm",
    "Engine": "remask.engine",
    "EngineOptions": "remask.options",
    "Progress": "remask.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'remask' has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
