"""Writes trained weights in the published layouts: LLaDA's for tiny, Llama's for its autoregressive twin."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from remask.benchmarks.tiny import tokenizer as vocab
from remask.benchmarks.tiny.model import Shape, TinyTransformer

MAX_SEQUENCE_LEN = 512
LLADA_PREFIX = "model.transformer."
LLAMA_NAMES = {
    "wte": "model.embed_tokens",
    "ln_f": "model.norm",
    "ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
}


def llama_name(name: str) -> str:
    """The name that Llama's layout gives to a parameter of the tiny transformer."""
    match name.split("."):
        case ["blocks", layer, "ff_out", kind]:
            return f"model.layers.{layer}.mlp.down_proj.{kind}"
        case ["blocks", layer, module, kind]:
            return f"model.layers.{layer}.{LLAMA_NAMES[module]}.{kind}"
        case [module, kind]:
            return f"{LLAMA_NAMES[module]}.{kind}"
    raise ValueError(f"no parameter of the tiny transformer: {name}")


def write_llada(model: TinyTransformer, shape: Shape, directory: Path) -> None:
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "mlp_hidden_size": shape.ffn,
        "activation_type": "silu",
        "block_type": "llama",
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": shape.rope_theta,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rms_norm_eps": shape.norm_eps,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "alibi": False,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "weight_tying": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "max_sequence_length": MAX_SEQUENCE_LEN,
        "mask_token_id": vocab.MASK_ID,
        "eos_token_id": vocab.EOS_ID,
        "pad_token_id": vocab.EOS_ID,
        "eot_token_id": vocab.EOT_ID,
        "torch_dtype": "bfloat16",
    }
    _write(directory, config, {LLADA_PREFIX + name: param for name, param in model.named_parameters()})


def write_llama(model: TinyTransformer, shape: Shape, directory: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.d_model,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "intermediate_size": shape.ffn,
        "hidden_act": "silu",
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": MAX_SEQUENCE_LEN,
        "bos_token_id": None,
        "eos_token_id": vocab.EOS_ID,
        "pad_token_id": vocab.EOS_ID,
        "torch_dtype": "bfloat16",
    }
    _write(directory, config, {llama_name(name): param for name, param in model.named_parameters()})


def read_llada(model: TinyTransformer, directory: Path) -> None:
    """Loads weights that `write_llada` wrote.

    Raises:
        RuntimeError: names or shapes are not this model's.
    """
    state = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix(LLADA_PREFIX): tensor for name, tensor in state.items()})


def _write(directory: Path, config: dict[str, object], state: dict[str, torch.nn.Parameter]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {name: param.detach().to(torch.bfloat16) for name, param in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    vocab.save(directory)
