"""The LLaDA family (arXiv 2502.09992): config keys and tensor names as published for LLaDA-8B and 1.5."""

from __future__ import annotations

from typing import Any

from remask.workers.models.config import ConfigReader, TransformerConfig
from remask.workers.models.families.base import Family, layer_names

EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"

# Options of the published modelling code that we do not compute; a checkpoint that sets one is refused.
_EXPECTED: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_with_affine": (True,),
    "scale_logits": (False,),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def parse_config(raw: dict[str, Any], source: str) -> TransformerConfig:
    """The shape in a LLaDA `config.json`."""
    config = ConfigReader(raw, source)
    config.expect("LLaDA", _EXPECTED)
    default_kv_heads = 1 if raw.get("multi_query_attention") else raw.get("n_heads")
    heads = config.heads("d_model", "n_heads", "n_kv_heads", default_kv_heads)
    default_ffn_size = int(config.positive_number("mlp_ratio", 4) * heads["hidden_size"])
    embedding_size = config.positive("embedding_size", raw.get("vocab_size"))
    vocab_size = config.positive("vocab_size", embedding_size)
    if embedding_size < vocab_size:
        raise config.refuse(f"embedding_size {embedding_size} is below vocab_size {vocab_size}")
    return TransformerConfig(
        num_layers=config.positive("n_layers"),
        **heads,
        ffn_size=config.positive("mlp_hidden_size", default_ffn_size),
        vocab_size=vocab_size,
        embedding_size=embedding_size,
        tied_embeddings=config.flag("weight_tying", default=True),
        rope_theta=config.positive_number("rope_theta", 10000.0),
        norm_eps=config.positive_number("rms_norm_eps", 1e-5),
        max_len=config.positive("max_sequence_length"),
        turn_ends=("<|eot_id|>",),
        dtype=config.dtype,
        **config.special_ids(vocab_size),
    )


def tensor_names(config: TransformerConfig) -> dict[str, str]:
    names = {EMBEDDING: "embedding", "model.transformer.ln_f.weight": "final_norm"}
    if not config.tied_embeddings:
        names[HEAD] = "head"
    layer = {
        "attn_norm": "attn_norm",
        "q_proj": "qkv[0]",
        "k_proj": "qkv[1]",
        "v_proj": "qkv[2]",
        "attn_out": "attn_out",
        "ff_norm": "ffn_norm",
        "ff_proj": "gate_up[0]",
        "up_proj": "gate_up[1]",
        "ff_out": "down",
    }
    layer = {f"{theirs}.weight": ours for theirs, ours in layer.items()}
    return names | layer_names("model.transformer.blocks.{}.", layer, config.num_layers)


FAMILY = Family(
    name="LLaDA",
    architectures=("LLaDAModelLM",),
    parse_config=parse_config,
    tensor_names=tensor_names,
    embedding=EMBEDDING,
    head=HEAD,
)
