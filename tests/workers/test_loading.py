"""Checkpoints: LLaDA-8B's names on the meta device, shards, and every broken file refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remask import InvalidRequest
from remask.workers.models.families import llada
from remask.workers.models.loading import destinations, load_checkpoint, read_config
from remask.workers.models.row_ops import rms_norm
from remask.workers.models.transformer import Transformer

# The values of LLaDA-8B-Instruct's published config.json that describe the model.
LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 126464,
    "weight_tying": False,
}


@pytest.fixture
def checkpoint(tmp_path: Path, golden_checkpoint: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(golden_checkpoint, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def edit_tensors(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def shard(directory: Path, count: int) -> None:
    """Splits the single file into `count` shards with an index."""
    path = directory / "model.safetensors"
    tensors, weight_map = load_file(path), {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()


def test_llada_8b_has_its_291_tensors_and_8_billion_parameters() -> None:
    """LLaDA 1.5 is a finetune of it, with the same sizes and names."""
    config = llada.parse_config(LLADA_8B, "config.json")
    model = Transformer(config)
    names = llada.tensor_names(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in destinations(model, names).items()}
    assert len(shapes) == 291
    assert shapes["model.transformer.wte.weight"] == (126464, 4096)
    assert shapes["model.transformer.ff_out.weight"] == (126464, 4096)
    assert shapes["model.transformer.ln_f.weight"] == (4096,)
    block = {
        name.removeprefix("model.transformer.blocks.31."): shape
        for name, shape in shapes.items()
        if name.startswith("model.transformer.blocks.31.")
    }
    assert block == {
        "attn_norm.weight": (4096,),
        "q_proj.weight": (4096, 4096),
        "k_proj.weight": (4096, 4096),
        "v_proj.weight": (4096, 4096),
        "attn_out.weight": (4096, 4096),
        "ff_norm.weight": (4096,),
        "ff_proj.weight": (12288, 4096),
        "up_proj.weight": (12288, 4096),
        "ff_out.weight": (4096, 12288),
    }
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert (config.mask_id, config.eos_ids, config.max_len, config.rope_theta) == (
        126336,
        (126081,),
        4096,
        5e5,
    )


@pytest.mark.parametrize("count", [1, 3])
def test_shards_with_an_index_give_the_same_weights(
    checkpoint: Path, golden_checkpoint: Path, count: int
) -> None:
    shard(checkpoint, count)
    whole, parts = load_checkpoint(golden_checkpoint), load_checkpoint(checkpoint)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(golden_checkpoint: Path, dtype: str) -> None:
    model = load_checkpoint(golden_checkpoint, dtype=dtype)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    raw = load_file(golden_checkpoint / "model.safetensors")
    assert torch.equal(model.embedding, raw["model.transformer.wte.weight"].to(model.embedding.dtype))


def test_auto_dtype_is_the_checkpoints(golden_checkpoint: Path) -> None:
    assert load_checkpoint(golden_checkpoint).embedding.dtype == torch.bfloat16


def test_eos_ids_come_from_the_generation_config_where_the_config_has_none(checkpoint: Path) -> None:
    edit_config(checkpoint, eos_token_id=...)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert read_config(checkpoint)[1].eos_ids == (1, 5)


def test_tied_embeddings_are_the_head(checkpoint: Path) -> None:
    edit_config(checkpoint, weight_tying=True)
    edit_tensors(checkpoint, model__transformer__ff_out__weight=None)
    model = load_checkpoint(checkpoint)
    x = torch.randn(2, 192, dtype=torch.bfloat16)
    normed = rms_norm(x, model.final_norm, 1e-5)
    assert torch.equal(model.logits(x), normed @ model.embedding.T)


def broken(message: str, directory: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_checkpoint(directory)


@pytest.mark.parametrize("count", [1, 3])
def test_a_head_that_repeats_the_embedding_may_be_stored_where_it_is_tied(
    checkpoint: Path, count: int
) -> None:
    edit_config(checkpoint, weight_tying=True)
    embedding = load_file(checkpoint / "model.safetensors")["model.transformer.wte.weight"]
    edit_tensors(checkpoint, model__transformer__ff_out__weight=embedding.clone())
    shard(checkpoint, count)
    model = load_checkpoint(checkpoint)
    assert model.head is None
    assert torch.equal(model.head_weight, embedding)


@pytest.mark.parametrize("change", ["one weight", "type"])
def test_a_stored_head_that_differs_where_it_is_tied_is_refused(checkpoint: Path, change: str) -> None:
    edit_config(checkpoint, weight_tying=...)  # tied, as in the published code
    head = load_file(checkpoint / "model.safetensors")["model.transformer.wte.weight"].clone()
    if change == "type":
        head = head.float()
    else:
        head[-1, -1] += 1
    edit_tensors(checkpoint, model__transformer__ff_out__weight=head)
    broken("weight_tying makes the embedding the head, but .* set weight_tying to false", checkpoint)


def test_a_head_that_is_missing_where_it_is_not_tied_is_refused(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__transformer__ff_out__weight=None)
    broken(r"missing tensors: model\.transformer\.ff_out\.weight; .*set weight_tying to true", checkpoint)


def test_a_missing_or_empty_directory_is_refused(tmp_path: Path) -> None:
    broken("is not a directory", tmp_path / "nothing")
    broken("holds no config.json", tmp_path)


def test_a_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    broken("holds neither model.safetensors nor", checkpoint)


def test_an_unreadable_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": ')
    broken("cannot be read", checkpoint)
    (checkpoint / "config.json").write_text("[]")
    broken("must hold a JSON object", checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": ...}, "'d_model' must be a positive integer"),
        ({"n_layers": "six"}, "'n_layers' must be a positive integer"),
        ({"n_heads": 5}, "do not make even heads"),
        ({"mask_token_id": 1}, "must be one id that does not end a text"),
        ({"mask_token_id": [0, 5]}, "must be one id that does not end a text"),
        ({"mask_token_id": 82}, "'mask_token_id' must be an id below 82"),
        ({"eos_token_id": ...}, "'eos_token_id' must be an id below 82"),
        ({"alibi": True, "include_bias": True}, "alibi = True .*include_bias = True"),
        ({"embedding_size": 80}, "embedding_size 80 is below vocab_size 82"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"rope_theta": "large"}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"weight_tying": "false"}, "'weight_tying' must be true or false"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"architectures": [["a"]]}, "is not supported; supported"),
    ],
)
def test_config_values_that_cannot_be_are_refused(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(checkpoint, **changes)
    broken(message, checkpoint)


def test_missing_extra_and_misshapen_tensors_are_listed_together(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint,
        model__transformer__ln_f__weight=None,
        model__transformer__surplus__weight=torch.zeros(2),
        model__transformer__ff_out__weight=torch.zeros(3, 192),
    )
    broken(
        r"missing tensors: model\.transformer\.ln_f\.weight; "
        r"unexpected tensors: model\.transformer\.surplus\.weight; "
        r"wrong shapes: model\.transformer\.ff_out\.weight is \(3, 192\), not \(82, 192\)",
        checkpoint,
    )


def test_tensors_of_another_type_or_in_two_shards_are_listed(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__transformer__ln_f__weight=torch.ones(192, dtype=torch.int8))
    broken(r"other types than F32, BF16, F16: model\.transformer\.ln_f\.weight is I8", checkpoint)
    edit_tensors(checkpoint, model__transformer__ln_f__weight=torch.ones(192))
    shard(checkpoint, 2)
    twice = load_file(checkpoint / "model-00001-of-00002.safetensors")
    name = next(iter(twice))
    second = checkpoint / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), name: twice[name]}, second)
    broken(f"in more than one shard: {name}", checkpoint)


def test_a_config_without_dtype_takes_that_of_the_tensors(checkpoint: Path) -> None:
    edit_config(checkpoint, torch_dtype=...)
    assert load_checkpoint(checkpoint).embedding.dtype == torch.bfloat16
    edit_tensors(
        checkpoint,
        **{k.replace(".", "__"): t.float() for k, t in load_file(checkpoint / "model.safetensors").items()},
    )
    assert load_checkpoint(checkpoint).embedding.dtype == torch.float32


def test_a_name_that_cannot_be_a_directory_is_refused() -> None:
    broken("is not a directory", Path("x" * 5000))


def test_a_long_list_of_missing_tensors_is_cut(checkpoint: Path) -> None:
    edit_config(checkpoint, n_layers=12)
    broken("and 34 more", checkpoint)


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    broken("is truncated or not safetensors", checkpoint)
    path.write_bytes(b"")
    broken("is truncated or not safetensors", checkpoint)


def test_shards_that_the_index_names_must_be_there(checkpoint: Path) -> None:
    shard(checkpoint, 3)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    broken("shards named by .* are missing: model-00002-of-00003.safetensors", checkpoint)


MEASURE = """
import resource, sys
from pathlib import Path
from remask.workers.models.loading import load_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import torch; torch.zeros(1)
before = peak()
model = load_checkpoint(Path(sys.argv[1]), dtype="float32")
print((peak() - before) / 1024, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.slow
def test_peak_memory_is_the_weights_plus_one_shard(tmp_path: Path) -> None:
    """Sixteen shards of 16 MB: all of them at once would be twice the weights."""
    shape = {"d_model": 1024, "n_heads": 8, "n_kv_heads": 8, "n_layers": 8, "mlp_hidden_size": 1024}
    raw = {
        **LLADA_8B,
        **shape,
        "vocab_size": 500,
        "embedding_size": 500,
        "eos_token_id": 1,
        "mask_token_id": 0,
    }
    config = llada.parse_config(raw, "config.json")
    model = Transformer(config)
    shapes = destinations(model, llada.tensor_names(config))
    save_file({name: torch.ones(t.shape) for name, t in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shard(tmp_path, 16)
    shard_mb = max(path.stat().st_size for path in tmp_path.glob("model-*")) / 2**20
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak_mb, weights_mb = map(float, run.stdout.split())
    assert weights_mb > 200
    assert peak_mb < weights_mb + shard_mb + 40  # the rest is the libraries' own
