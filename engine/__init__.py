"""remask: a serving engine for masked diffusion language models.

`LLM` and `AsyncLLM` are imported when first used: `import remask` touches neither torch, Ray nor a GPU.
"""

from __future__ import annotations

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
    from remask.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Bernoulli",
    "CappedThreshold",
    "CompletionOutput",
    "Dream",
    "EngineDead",
    "EntropyBound",
    "Factor",
    "InvalidRequest",
    "LowProb",
    "MemoryField",
    "OracleLoo",
    "Overloaded",
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


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from remask.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from remask.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'remask' has no attribute {name!r}")
