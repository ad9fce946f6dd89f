"""Weights as arrays that processes share, for workers without files.

The arrays are the fused parameters as they are in memory. A worker uses read-only arrays of a shared object
store in place, so the workers of a node share one copy.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from remask.workers.models.config import TransformerConfig
from remask.workers.models.transformer import Transformer

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


class SharedWeights(NamedTuple):
    """The config and the parameters of a model as bytes and arrays."""

    config: bytes  # TransformerConfig as msgpack
    dtype: str  # torch's name, such as "bfloat16"
    arrays: dict[str, NDArray[np.generic]]  # the parameters' bits, by path


def share(model: Transformer) -> SharedWeights:
    """The weights of a model on the CPU, without a copy."""
    dtype = model.embedding.dtype
    words = _WORDS[dtype.itemsize]
    arrays = {path: parameter.view(words).numpy() for path, parameter in model.named_parameters()}
    return SharedWeights(msgspec.msgpack.encode(model.config), str(dtype).removeprefix("torch."), arrays)


def model_of(shared: SharedWeights, device: str) -> Transformer:
    """The model on a device; on the CPU it uses the arrays in place."""
    config = msgspec.msgpack.decode(shared.config, type=TransformerConfig)
    dtype: torch.dtype = getattr(torch, shared.dtype)
    model = Transformer(config)
    for path, _ in list(model.named_parameters()):
        owner, _, name = path.rpartition(".")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(shared.arrays[path]).view(dtype)
        parameter = nn.Parameter(tensor.to(device), requires_grad=False)
        setattr(model.get_submodule(owner), name, parameter)
    return model.eval()
