"""Weights as shared arrays: every bit, in every dtype, and on the CPU no copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN

from remask.workers.models.loading import load_checkpoint
from remask.workers.models.shared import SharedWeights, model_of, share


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny", "lladamoe-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_comes_back_with_every_bit(checkpoint: str, dtype: Any) -> None:
    model = load_checkpoint(GOLDEN / checkpoint, dtype=dtype)
    shared = share(model)
    received = SharedWeights(shared.config, shared.dtype, {k: v.copy() for k, v in shared.arrays.items()})
    for array in received.arrays.values():
        array.flags.writeable = False  # as an object store gives them
    again = model_of(received, "cpu")
    assert again.config == model.config
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    for path, parameter in ours.items():
        assert theirs[path].dtype == parameter.dtype
        assert torch.equal(theirs[path], parameter)
        words = theirs[path].view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        assert np.shares_memory(words, received.arrays[path])
