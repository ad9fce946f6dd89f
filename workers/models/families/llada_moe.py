"""The LLaDA-MoE family: LLaDA-MoE-7B-A1B, Base and Instruct. Queries and keys are normalised per head, and
every MLP is a layer of experts whose weights are not renormalised."""

from __future__ import annotations

from typing import Any

from remask.workers.models.config import ConfigReader, ExpertsConfig, TransformerConfig
from remask.workers.models.families.base import Family, layer_names

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Options of the configuration class that are not computed. Those of the router's groups, scaling and
# renormalisation are read by the published class and used by none of its arithmetic.
_EXPECTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "moe_router_enable_expert_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}


def parse_config(raw: dict[str, Any], source: str) -> TransformerConfig:
    """The shape in a LLaDA-MoE `config.json`. No size has a default."""
    config = ConfigReader(raw, source)
    config.expect("LLaDA-MoE", _EXPECTED)
    vocab_size, num_layers = config.positive("vocab_size"), config.positive("num_hidden_layers")
    count, num_active = config.positive("num_experts"), config.positive("num_experts_per_tok")
    if num_active > count:
        raise config.refuse(f"num_experts_per_tok {num_active} is above num_experts {count}")
    freq = raw.get("moe_layer_freq", 1)
    layers = [freq] * num_layers if isinstance(freq, int) else freq
    if not isinstance(layers, list) or len(layers) != num_layers or any(own != 1 for own in layers):
        problem = f"config key 'moe_layer_freq' must be 1 for each of the {num_layers} layers, not {freq!r}"
        raise config.refuse(problem)
    size = config.positive("expert_intermediate_size")
    shared = raw.get("shared_expert_intermediate_size")
    return TransformerConfig(
        num_layers=num_layers,
        **config.heads("hidden_size", "num_attention_heads", "num_key_value_heads"),
        ffn_size=size,
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        rope_theta=config.positive_number("rope_theta"),
        norm_eps=config.positive_number("rms_norm_eps"),
        max_len=config.positive("max_position_embeddings"),
        turn_ends=("<|role_end|>",),
        qk_norm=config.flag("qk_layernorm", default=False),
        experts=ExpertsConfig(
            count=count,
            num_active=num_active,
            size=size,
            shared_size=None if shared is None else config.positive("shared_expert_intermediate_size"),
        ),
        dtype=config.dtype,
        **config.special_ids(vocab_size),
    )


def tensor_names(config: TransformerConfig) -> dict[str, str]:
    assert config.experts is not None, "every layer has experts"
    names = {EMBEDDING: "embedding", "model.norm.weight": "final_norm"}
    if not config.tied_embeddings:
        names[HEAD] = "head"
    layer = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "qkv[0]",
        "self_attn.k_proj": "qkv[1]",
        "self_attn.v_proj": "qkv[2]",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate": "experts.router",
    }
    if config.qk_norm:
        layer |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    if config.experts.shared_size is not None:
        layer |= {
            "shared_expert.gate_proj": "experts.shared_gate_up[0]",
            "shared_expert.up_proj": "experts.shared_gate_up[1]",
            "shared_expert.down_proj": "experts.shared_down",
        }
    for expert in range(config.experts.count):
        layer |= {
            f"mlp.experts.{expert}.gate_proj": f"experts.gate_up[{expert},0]",
            f"mlp.experts.{expert}.up_proj": f"experts.gate_up[{expert},1]",
            f"mlp.experts.{expert}.down_proj": f"experts.down[{expert},0]",
        }
    layer = {f"{theirs}.weight": ours for theirs, ours in layer.items()}
    return names | layer_names("model.layers.{}.", layer, config.num_layers)


FAMILY = Family(
    name="LLaDA-MoE",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    parse_config=parse_config,
    tensor_names=tensor_names,
    embedding=EMBEDDING,
    head=HEAD,
    mask_token="<|mask|>",
)
