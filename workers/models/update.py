"""New weights for a model that runs: read and checked in host memory while it serves, then put in the place
of the old ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from remask.scheduler.errors import InvalidRequest
from remask.workers.models import row_ops
from remask.workers.models.config import TransformerConfig
from remask.workers.models.families import families
from remask.workers.models.fp8 import ScaledWeight
from remask.workers.models.loading import (
    DTYPES,
    STORED_DTYPES,
    Header,
    check_checkpoint,
    check_tensors,
    destinations,
    read_tensors,
)
from remask.workers.models.shared import SharedWeights, model_of
from remask.workers.models.transformer import Transformer

# A checkpoint directory (Path); tensors or arrays by the names of a checkpoint, or Ray's reference to them;
# or `SharedWeights`, which another process has made of these. Anything else is refused.
Weights: TypeAlias = Any

_STORED_NAMES = {DTYPES[name]: stored for stored, name in STORED_DTYPES.items()}


def num_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights."""
    model = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def read_weights(weights: Weights, config: TransformerConfig, dtype: torch.dtype) -> Transformer:
    """Weights for a model that runs, in host memory.

    Args:
        weights: where they are.
        config: the shape of the model.
        dtype: its dtype.

    Raises:
        InvalidRequest: they are not those of a model of this shape and family, or cannot be read.
    """
    try:
        if isinstance(weights, SharedWeights):
            return model_of(weights, "cpu").to(dtype)
        if isinstance(weights, Path):
            return _from_directory(weights, config, dtype)
        return _from_tensors(_resolved(weights), config, dtype)
    except InvalidRequest as error:
        raise error.renamed({"model": "weights"}) from None


@torch.no_grad()
def replace_weights(model: Transformer, staged: Transformer) -> None:
    """Gives a model the weights of another one of its shape, in host memory, which is not used any more. On a
    GPU they are copied, so that addresses in captured graphs hold; fp8 is quantized again."""
    for path, new in staged.named_parameters():
        owner_path, _, name = path.rpartition(".")
        old = getattr(model.get_submodule(owner_path), name)
        if isinstance(old, ScaledWeight):
            values, scales = row_ops.quantize_rows(new.to(old.values.device))
            old.values.copy_(values)
            old.scales.copy_(scales)
        elif old.is_cuda:
            old.copy_(new)
        else:
            old.data = new.data  # the old memory may be shared and read-only


def _from_directory(directory: Path, config: TransformerConfig, dtype: torch.dtype) -> Transformer:
    found = check_checkpoint(directory)
    differing = [
        f"{field.name} is {getattr(found.config, field.name)!r}, not {getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name != "dtype" and getattr(found.config, field.name) != getattr(config, field.name)
    ]
    if differing:
        problem = f"is another model than the one that runs: {'; '.join(differing)}"
        raise InvalidRequest("weights", str(directory), f"{problem}; make a new engine for it")
    return read_tensors(found, dtype, "cpu")


def _from_tensors(tensors: Mapping[str, Any], config: TransformerConfig, dtype: torch.dtype) -> Transformer:
    family = next(own for own in families().values() if own.name == config.family)
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        try:
            found[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidRequest(f"weights[{name!r}]", value, f"is no tensor: {error}") from None
    headers = {
        name: Header(tuple(own.shape), _STORED_NAMES.get(own.dtype, str(own.dtype).removeprefix("torch.")))
        for name, own in found.items()
    }
    model = Transformer(config)
    names = check_tensors("the state dict", headers, model, family)
    is_stored_twice = config.tied_embeddings and family.head in found
    if is_stored_twice and not torch.equal(found[family.head], found[family.embedding]):
        problem = f"{family.head} differs from {family.embedding}, and the model has one tensor for both"
        raise InvalidRequest("weights", family.head, f"{problem}; leave it out")
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, target in destinations(model, names).items():
            target.copy_(found[name])
    return model.eval()


def _resolved(weights: Any) -> Mapping[str, Any]:
    """The state dict, fetched if it is a reference of Ray's."""
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(weights, ray.ObjectRef):
        try:
            weights = ray.get(weights)
        except ray.exceptions.RayError as error:
            problem = f"cannot be fetched: {type(error).__name__}; put the state dict again"
            raise InvalidRequest("weights", weights, problem) from None
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        problem = "must be a checkpoint directory, a state dict, or Ray's reference to one"
        raise InvalidRequest("weights", weights, problem)
    return weights
