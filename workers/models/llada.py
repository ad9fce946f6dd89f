"""The LLaDA family (arXiv 2502.09992): config keys and tensor names as published for LLaDA-8B and 1.5."""

from __future__ import annotations

import math
from typing import Any

from remask.scheduler.errors import InvalidRequest
from remask.workers.models.config import TransformerConfig

ARCHITECTURES = ("LLaDAModelLM",)
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
    """The shape in a LLaDA `config.json`.

    Args:
        raw: the parsed file.
        source: its path, for errors.

    Raises:
        InvalidRequest: a key is missing, of the wrong type, or asks for something LLaDA-8B does not have.
    """
    differing = [
        f"{key} = {raw[key]!r} (supported: {', '.join(map(repr, allowed))})"
        for key, allowed in _EXPECTED.items()
        if key in raw and raw[key] not in allowed
    ]
    if differing:
        raise InvalidRequest("model", source, f"this LLaDA variant is not supported: {'; '.join(differing)}")

    def positive(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InvalidRequest("model", source, f"config key {key!r} must be a positive integer")
        return value

    def positive_number(key: str, default: float) -> float:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InvalidRequest("model", source, f"config key {key!r} must be a positive number")
        return float(value)

    def token_ids(key: str) -> tuple[int, ...]:
        value = raw.get(key)
        ids: tuple[Any, ...] = tuple(value) if isinstance(value, list) else (value,)
        if not ids or any(
            not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size for i in ids
        ):
            raise InvalidRequest(
                "model", source, f"config key {key!r} must be an id below {vocab_size}, not {value!r}"
            )
        return ids

    hidden_size, num_heads = positive("d_model"), positive("n_heads")
    num_kv_heads = positive("n_kv_heads", 1 if raw.get("multi_query_attention") else num_heads)
    if hidden_size % num_heads or (hidden_size // num_heads) % 2 or num_heads % num_kv_heads:
        raise InvalidRequest(
            "model",
            source,
            f"d_model {hidden_size}, n_heads {num_heads}, n_kv_heads {num_kv_heads} do not make even heads",
        )
    embedding_size = positive("embedding_size", raw.get("vocab_size"))
    vocab_size = positive("vocab_size", embedding_size)
    if embedding_size < vocab_size:
        raise InvalidRequest(
            "model", source, f"embedding_size {embedding_size} is below vocab_size {vocab_size}"
        )
    is_tied = True if raw.get("weight_tying") is None else raw["weight_tying"]
    if not isinstance(is_tied, bool):
        raise InvalidRequest(
            "model", source, f"config key 'weight_tying' must be true or false, not {is_tied!r}"
        )
    mask_ids, eos_ids = token_ids("mask_token_id"), token_ids("eos_token_id")
    eot_id = token_ids("eot_token_id")[0] if raw.get("eot_token_id") is not None else None
    if len(mask_ids) != 1 or mask_ids[0] in (*eos_ids, eot_id):
        raise InvalidRequest(
            "model", source, f"mask_token_id {raw['mask_token_id']!r} must be one id that does not end a text"
        )
    return TransformerConfig(
        num_layers=positive("n_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=positive("mlp_hidden_size", int(positive_number("mlp_ratio", 4) * hidden_size)),
        vocab_size=vocab_size,
        embedding_size=embedding_size,
        tied_embeddings=is_tied,
        rope_theta=positive_number("rope_theta", 10000.0),
        norm_eps=positive_number("rms_norm_eps", 1e-5),
        max_len=positive("max_sequence_length"),
        mask_id=mask_ids[0],
        eos_ids=eos_ids,
        eot_id=eot_id,
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
    )


def tensor_names(config: TransformerConfig) -> dict[str, str]:
    """Checkpoint name -> parameter of our transformer.

    `blocks.3.qkv[1]` means the second part of a fused matrix (q, k, v; or gate, up).
    """
    names = {EMBEDDING: "embedding", "model.transformer.ln_f.weight": "final_norm"}
    if not config.tied_embeddings:
        names[HEAD] = "head"
    for i in range(config.num_layers):
        for theirs, ours in (
            ("attn_norm", "attn_norm"),
            ("q_proj", "qkv[0]"),
            ("k_proj", "qkv[1]"),
            ("v_proj", "qkv[2]"),
            ("attn_out", "attn_out"),
            ("ff_norm", "ffn_norm"),
            ("ff_proj", "gate_up[0]"),
            ("up_proj", "gate_up[1]"),
            ("ff_out", "down"),
        ):
            names[f"model.transformer.blocks.{i}.{theirs}.weight"] = f"blocks.{i}.{ours}"
    return names
