"""What a worker is started with. Imports neither torch nor Ray: options are read before either is needed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from remask.workers.attention.names import AttentionName


def fix(text: str) -> dict[str, Any]:
    """The `extra` of a field's `Meta`: what an error says of a value that the field does not take."""
    return {"fix": text}


PositiveInt = Annotated[int, Meta(ge=1, extra=fix("must be a positive integer"))]
Share = Annotated[float, Meta(gt=0, le=1, extra=fix("must lie above 0 and not above 1"))]


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of an engine that its workers need; `EngineOptions` documents them."""

    dtype: Annotated[str, Meta(extra=fix("use one of auto, float32, bfloat16, float16"))] = "auto"
    device: Annotated[str, Meta(extra=fix("use auto, cpu, cuda or cuda:N"))] = "auto"
    load_format: Literal["auto", "dummy", "object_store"] = "auto"
    batch_invariant: bool = False
    max_num_rows: PositiveInt | None = None
    attention_backend: AttentionName = "auto"
    quantization: Literal[None, "fp8"] = None
    gpu_memory_utilization: Share = 0.9
    max_key_bytes: PositiveInt | None = None


class WorkerSetup(WorkerOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes to each worker."""

    model: str  # a directory, on the worker's own node
