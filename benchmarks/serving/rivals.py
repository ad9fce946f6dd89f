"""Ways to serve an autoregressive model, by the names that users give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from remask import InvalidRequest
from remask.benchmarks.serving.autoregressive import ContinuousTarget, GenerateTarget, VllmTarget
from remask.benchmarks.serving.server import ServerTarget
from remask.benchmarks.serving.targets import Target
from remask.benchmarks.tiny.evaluate import TWIN_DIRECTORY
from remask.benchmarks.workloads import Job

RIVALS = ("generate", "continuous", "vllm")


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def check_rival(parameter: str, name: str, others: Sequence[str] = ()) -> None:
    """Raises InvalidRequest if there is no rival with this name."""
    if name not in (*others, *RIVALS) and not is_server(name):
        fix = f"must be {', '.join((*others, *RIVALS))} or a server's http(s) URL"
        raise InvalidRequest(parameter, name, fix)


def open_rival(
    name: str,
    jobs: Sequence[Job],
    max_requests: int,
    *,
    baseline: Path | None = None,
    served_model: str | None = None,
    api_key: str | None = None,
    dtype: str = "float32",
    memory_share: float = 0.9,
) -> Target:
    """A way to serve an autoregressive model.

    Args:
        name: one of `RIVALS`, or a server's URL.
        jobs: what it will be asked; the longest decides how much room a cache has.
        max_requests: that it gets at once.
        baseline: its checkpoint; None: the embedded twin. A server has its own.
        served_model: what a server calls its model; None: its first.
        api_key: of a server; None: it asks for none.
        dtype: of the weights, if they are loaded in this process.
        memory_share: share of a GPU's memory, for rivals that allocate it in advance.

    Raises:
        InvalidRequest: the checkpoint is invalid.
        Unavailable: it is not installed, or the server does not answer.
    """
    directory, torch_dtype = baseline or TWIN_DIRECTORY, getattr(torch, dtype)
    if is_server(name):
        return ServerTarget(name, served_model, api_key)
    if name == "generate":
        return GenerateTarget(directory, torch_dtype, max_requests)
    if name == "continuous":
        return ContinuousTarget(directory, torch_dtype, max_requests, jobs)
    return VllmTarget(directory, torch_dtype, memory_share)
