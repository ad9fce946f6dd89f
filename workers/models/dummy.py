"""Random weights for a config, so that speed can be measured without a checkpoint.

A common initialisation gives a flat softmax over the vocabulary: no token reaches a threshold, and all
policies decide alike. These weights spread the probabilities (tests pin the distribution). The generated text
is meaningless.
"""

from __future__ import annotations

from pathlib import Path

import torch

from remask.workers.models.loading import pick_dtype, read_config
from remask.workers.models.transformer import Transformer

SEED = 0
# Of Gaussian logits with deviation s, the largest of V stands out once s exceeds sqrt(2 ln V), 4.6 at 32,000.
HEAD_SCALE = 16.0
# Sharper attention than random queries and keys give, so that rows attend to different tokens and propose
# different ones.
QUERY_KEY_SCALE = 2.0
# Attention adds less to a row than its own token does. About half of the tokens committed with confidence
# then keep their leave-one-out probability, so verifying policies both keep and remask tokens.
ATTENTION_SCALE = 0.3


@torch.no_grad()
def dummy_model(directory: Path, *, dtype: str = "auto", device: str = "cpu") -> Transformer:
    """A model with the shape in a directory's `config.json` and random weights, equal in every process on the
    same kind of device.

    Each parameter is drawn in fp32 on the device and then rounded, so every dtype holds the same model, and
    peak memory is the weights plus one fp32 parameter.

    Args:
        directory: contains `config.json`; weights and tokenizer are not needed.
        dtype: "auto" (the config's, or float32), "float32", "bfloat16" or "float16".
        device: a torch device.

    Raises:
        InvalidRequest: no directory, or an invalid config.
    """
    _, config = read_config(directory)
    model = Transformer(config)
    torch_dtype = pick_dtype(dtype, config.dtype or "float32", str(directory / "config.json"))
    model.to(torch_dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    num_queries_and_keys = (config.num_heads + config.num_kv_heads) * config.head_dim
    scales = {"head": HEAD_SCALE, "attn_out": ATTENTION_SCALE}
    for path, parameter in model.named_parameters():
        kind = path.rpartition(".")[2]
        if parameter.ndim == 1:
            parameter.fill_(0.0 if kind == "qkv_bias" else 1.0)  # norms are 1
            continue
        # Deviation 1/sqrt(inputs) keeps activations at the size of a row of the embedding, 1.
        deviation = 1.0 if kind == "embedding" else parameter.shape[-1] ** -0.5
        numbers = torch.empty(parameter.shape, device=device).normal_(0.0, deviation, generator=generator)
        numbers *= scales.get(kind, 1.0)
        if kind == "qkv":
            numbers[:num_queries_and_keys] *= QUERY_KEY_SCALE
        parameter.copy_(numbers)
    return model.eval()
