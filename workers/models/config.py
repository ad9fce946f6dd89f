"""Parsed `config.json`: ids and lengths of a model, and the shape of a transformer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts about a model that requests depend on.

    Attributes:
        vocab_size: ids a request may use.
        max_len: largest sequence (prompt and canvas) in tokens.
        eos_ids: ids that end a text.
    """

    vocab_size: int
    max_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    eot_id: int | None


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The shape of a masked diffusion transformer.

    Attributes:
        embedding_size: rows of the embedding and the head; at least `vocab_size`.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    embedding_size: int
    tied_embeddings: bool
    rope_theta: float
    norm_eps: float
    dtype: str | None  # "float32", "bfloat16" or "float16"; None: not said, the tensors' own
