"""The Dream family (arXiv 2508.15487): Dream-7B and DiffuCoder-7B. Layers and tensor names are Qwen2's, and
logits are shifted: row i - 1 predicts position i."""

from __future__ import annotations

from typing import Any

from remask.workers.models.config import ConfigReader, TransformerConfig
from remask.workers.models.families.base import Family, layer_names

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_LEN = 2048  # prompt and answer together, as published; `max_position_embeddings` is inherited

# Options of the configuration class that are not computed. Dropout is for training, and the sliding window
# has no effect unless it is used.
_EXPECTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "quantization_config": (None,),
}


def parse_config(raw: dict[str, Any], source: str) -> TransformerConfig:
    """The shape in a Dream `config.json`. No size has a default: those of the published class are wrong for
    its checkpoints."""
    config = ConfigReader(raw, source)
    config.expect("Dream", _EXPECTED)
    vocab_size = config.positive("vocab_size")
    return TransformerConfig(
        num_layers=config.positive("num_hidden_layers"),
        **config.heads("hidden_size", "num_attention_heads", "num_key_value_heads"),
        ffn_size=config.positive("intermediate_size"),
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        rope_theta=config.positive_number("rope_theta"),
        norm_eps=config.positive_number("rms_norm_eps"),
        max_len=min(MAX_LEN, config.positive("max_position_embeddings")),
        turn_ends=("<|im_end|>", "<|dlm_pad|>"),
        shift=1,
        qkv_bias=True,
        dtype=config.dtype,
        **config.special_ids(vocab_size),
    )


def tensor_names(config: TransformerConfig) -> dict[str, str]:
    names = {EMBEDDING: "embedding", "model.norm.weight": "final_norm"}
    if not config.tied_embeddings:
        names[HEAD] = "head"
    layer = {
        "input_layernorm.weight": "attn_norm",
        "self_attn.q_proj.weight": "qkv[0]",
        "self_attn.k_proj.weight": "qkv[1]",
        "self_attn.v_proj.weight": "qkv[2]",
        "self_attn.q_proj.bias": "qkv_bias[0]",
        "self_attn.k_proj.bias": "qkv_bias[1]",
        "self_attn.v_proj.bias": "qkv_bias[2]",
        "self_attn.o_proj.weight": "attn_out",
        "post_attention_layernorm.weight": "ffn_norm",
        "mlp.gate_proj.weight": "gate_up[0]",
        "mlp.up_proj.weight": "gate_up[1]",
        "mlp.down_proj.weight": "down",
    }
    return names | layer_names("model.layers.{}.", layer, config.num_layers)


FAMILY = Family(
    name="Dream",
    architectures=("DreamModel",),
    parse_config=parse_config,
    tensor_names=tensor_names,
    embedding=EMBEDDING,
    head=HEAD,
)
