"""What a model family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from remask.workers.models.config import TransformerConfig


def layer_names(prefix: str, layer: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """Names of the tensors of all layers.

    Args:
        prefix: of a layer's tensors in the checkpoint, with `{}` for its number.
        layer: checkpoint name -> parameter within a layer.
        num_layers: number of layers.
    """
    return {
        f"{prefix.format(i)}{theirs}": f"blocks.{i}.{ours}"
        for i in range(num_layers)
        for theirs, ours in layer.items()
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        name: of the family, in messages.
        architectures: its names in `architectures` of a `config.json`.
        parse_config: the shape in a parsed `config.json`, whose path is given for errors; raises
            InvalidRequest for anything that the transformer does not compute.
        tensor_names: checkpoint name -> parameter of `remask.workers.models.transformer`.
            `blocks.3.qkv[1]` is the second part of a fused matrix (q, k, v; or gate, up), and
            `blocks.3.experts.gate_up[7,1]` that of expert 7.
        embedding, head: names of the two tensors that tied embeddings make one.
        mask_token: text of the mask token, whose id the tokenizer gives if `config.json` has no
            `mask_token_id`; None: `config.json` must have it.
    """

    name: str
    architectures: tuple[str, ...]
    parse_config: Callable[[dict[str, Any], str], TransformerConfig]
    tensor_names: Callable[[TransformerConfig], dict[str, str]]
    embedding: str
    head: str
    mask_token: str | None = None
