"""What every family's `config.json` is turned into: the shape of the transformer and its special ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape and special ids of a masked diffusion transformer.

    Attributes:
        vocab_size: ids a request may use.
        embedding_size: rows of the embedding and the head; at least `vocab_size`.
        max_len: largest sequence (prompt and canvas) in tokens.
        eos_ids: ids that end a text.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    embedding_size: int
    tied_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    eot_id: int | None
    dtype: str | None  # "float32", "bfloat16" or "float16"; None: not said, the tensors' own
