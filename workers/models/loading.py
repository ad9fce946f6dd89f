"""Checkpoints from a local Hugging Face directory: config, then safetensors shard by shard into fused
parameters.

Nothing is looked up online and no code of a checkpoint runs. All names and shapes are checked from the
shards' headers before a weight is read; then tensors are copied one at a time, so peak memory is the weights
plus one shard.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remask.scheduler.errors import InvalidRequest
from remask.workers.models.config import TransformerConfig
from remask.workers.models.families import Family, families, refusal_of
from remask.workers.models.transformer import Transformer

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names
MAX_LISTED = 20  # names listed in an error
COMPARED_ROWS = 4096  # of two tensors at a time


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        InvalidRequest: unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest("model", str(path), f"cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequest("model", str(path), "must hold a JSON object")
    return content


def read_raw_config(directory: Path) -> dict[str, Any]:
    """The object in a directory's `config.json`.

    Raises:
        InvalidRequest: no directory, no config.json, or not JSON.
    """
    try:
        is_directory = directory.is_dir()
    except OSError:  # a name that is invalid on this file system
        is_directory = False
    if not is_directory:
        raise InvalidRequest(
            "model", str(directory), "is not a directory; give a local checkpoint directory, or 'tiny'"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise InvalidRequest(
            "model", str(directory), "holds no config.json; give a Hugging Face checkpoint directory"
        )
    return read_json(path)


def architecture_of(raw: dict[str, Any]) -> str | None:
    """The first of a config's `architectures`."""
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return name if isinstance(name, str) else None


def read_config(directory: Path) -> tuple[Family, TransformerConfig]:
    """Family and shape of the checkpoint in a directory.

    Raises:
        InvalidRequest: no directory, no config.json, an unknown architecture, or invalid values.
    """
    raw, path = read_raw_config(directory), directory / "config.json"
    generation = directory / "generation_config.json"
    if raw.get("eos_token_id") is None and generation.is_file():
        raw["eos_token_id"] = read_json(generation).get("eos_token_id")
    name = architecture_of(raw)
    family = families().get(name or "")
    if family is not None and family.mask_token is not None and raw.get("mask_token_id") is None:
        raw["mask_token_id"] = added_token_id(directory, family.mask_token)
    if family is None:
        raise InvalidRequest("model", str(path), refusal_of(name))
    return family, replace(family.parse_config(raw, str(path)), family=family.name)


def added_token_id(directory: Path, text: str) -> int | None:
    """The id of a special token in the files of a tokenizer; None: it is in none."""
    config, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if config.is_file():
        listed = read_json(config).get("added_tokens_decoder") or {}
        for token_id, token in listed.items() if isinstance(listed, dict) else ():
            if isinstance(token, dict) and token.get("content") == text and str(token_id).isdecimal():
                return int(token_id)
    if tokenizer.is_file():
        for token in read_json(tokenizer).get("added_tokens") or ():
            if isinstance(token, dict) and token.get("content") == text:
                return token.get("id")
    return None


def pick_dtype(requested: str, checkpoints: str, source: str) -> torch.dtype:
    """The weights' dtype; "auto" is the checkpoint's."""
    name = checkpoints if requested == "auto" else requested
    if not isinstance(name, str) or name not in DTYPES:
        where = ("model", source) if requested == "auto" else ("dtype", requested)
        raise InvalidRequest(*where, f"dtype {name!r} is not supported; use one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def destinations(model: Transformer, names: dict[str, str]) -> dict[str, Tensor]:
    """Checkpoint name -> the (part of a) parameter it fills; parts are views into fused parameters."""
    config = model.config
    kv_size = config.num_kv_heads * config.head_dim
    qkv_sizes = [config.num_heads * config.head_dim, kv_size, kv_size]
    parameters = dict(model.named_parameters())
    result = {}
    for theirs, ours in names.items():
        match = re.fullmatch(r"(.*\.(\w+))\[(?:(\d+),)?(\d)\]", ours)
        if match is None:
            result[theirs] = parameters[ours]
            continue
        path, kind, expert, part = match.groups()
        whole = parameters[path] if expert is None else parameters[path][int(expert)]
        if kind.startswith("qkv"):
            sizes = qkv_sizes
        else:
            sizes = [len(whole) // 2] * 2 if kind.endswith("gate_up") else [len(whole)]
        result[theirs] = whole.split(sizes)[int(part)]
    return result


class Checkpoint(NamedTuple):
    """A directory whose files were checked.

    Attributes:
        directory: where they are.
        family: its family.
        config: its shape.
        model: the transformer, on the meta device.
        names: checkpoint name -> parameter.
        shards: its files.
        stored_dtype: that of the largest tensor, under its name in `DTYPES`.
    """

    directory: Path
    family: Family
    config: TransformerConfig
    model: Transformer
    names: dict[str, str]
    shards: list[Path]
    stored_dtype: str

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def check_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a directory. Its headers are checked, and no weight is read.

    Raises:
        InvalidRequest: see `load_checkpoint`.
    """
    family, config = read_config(directory)
    model = Transformer(config)
    shards = find_shards(directory)
    found, repeated = read_headers(shards)
    names = check_tensors(str(directory), found, model, family, repeated)
    if config.tied_embeddings:
        check_tied(directory, shards, family)
    largest = max(found.values(), key=lambda header: math.prod(header.shape))
    return Checkpoint(directory, family, config, model, names, shards, STORED_DTYPES[largest.dtype])


def load_checkpoint(directory: Path, *, dtype: str = "auto", device: str = "cpu") -> Transformer:
    """The model in a local checkpoint directory, on a device and in a dtype.

    Args:
        directory: `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: a torch device.

    Raises:
        InvalidRequest: anything missing, unreadable, truncated or of the wrong name or shape; names are
        listed.
    """
    found = check_checkpoint(directory)
    stored = found.config.dtype or found.stored_dtype
    return read_tensors(found, pick_dtype(dtype, stored, str(directory / "config.json")), device)


def read_tensors(found: Checkpoint, dtype: torch.dtype, device: str) -> Transformer:
    """The model of a directory whose files were checked."""
    model = found.model.to(dtype).to_empty(device=device)
    targets = destinations(model, found.names)
    for shard in found.shards:
        with _open(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not iterable)
                if name in targets:  # a tied head may be stored, too
                    targets[name].copy_(tensors.get_tensor(name))
    logger.info("loaded %s: %d tensors, %s on %s", found.directory, len(targets), dtype, device)
    return model.eval()


def find_shards(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, each checked to exist."""
    single, index = directory / "model.safetensors", directory / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidRequest("model", str(index), "has no weight_map; download the file again")
        if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            raise InvalidRequest("model", str(index), "weight_map must name files beside it")
        shards = [directory / name for name in sorted(set(weight_map.values()))]
    elif single.is_file():
        shards = [single]
    else:
        raise InvalidRequest("model", str(directory), f"holds neither model.safetensors nor {INDEX_FILE}")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise InvalidRequest(
            "model", str(directory), f"shards named by {INDEX_FILE} are missing: {_listed(missing)}"
        )
    return shards


class Header(NamedTuple):
    """What is known of a stored tensor before it is read; the type under the name that safetensors has."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(shards: list[Path]) -> tuple[dict[str, Header], list[str]]:
    """The headers of files by the tensors' names, and the names that several of them have."""
    found: dict[str, Header] = {}
    repeated: list[str] = []
    for shard in shards:
        with _open(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not iterable)
                if name in found:
                    repeated.append(name)
                header = tensors.get_slice(name)
                found[name] = Header(tuple(header.get_shape()), header.get_dtype())
    return found, repeated


def check_tensors(
    source: str, found: Mapping[str, Header], model: Transformer, family: Family, repeated: Sequence[str] = ()
) -> dict[str, str]:
    """Compares names, shapes and types of tensors with what a model needs.

    Args:
        source: where they are, for errors.
        found: their headers.
        model: the model.
        family: its family.
        repeated: names that stand in several files.

    Returns:
        Checkpoint name -> parameter.

    Raises:
        InvalidRequest: listing missing, unexpected and repeated tensors, wrong shapes and types.
    """
    names = family.tensor_names(model.config)
    expected = {name: tuple(t.shape) for name, t in destinations(model, names).items()}
    known = expected | ({family.head: expected[family.embedding]} if model.config.tied_embeddings else {})
    wrong = [
        f"{n} is {found[n].shape}, not {s}" for n, s in known.items() if n in found and found[n].shape != s
    ]
    problems = [
        f"{what}: {_listed(listed)}"
        for what, listed in (
            ("missing tensors", [name for name in expected if name not in found]),
            ("unexpected tensors", [name for name in found if name not in known]),
            ("wrong shapes", wrong),
            ("tensors in more than one shard", repeated),
            (
                f"tensors of other types than {', '.join(STORED_DTYPES)}",
                [f"{name} is {own.dtype}" for name, own in found.items() if own.dtype not in STORED_DTYPES],
            ),
        )
        if listed
    ]
    if family.head in expected and family.head not in found:
        problems.append("if the embedding is the head, set weight_tying to true in config.json")
    if problems:
        raise InvalidRequest("model", source, "; ".join(problems))
    return names


def check_tied(directory: Path, shards: list[Path], family: Family) -> None:
    """Checks that a stored head equals the embedding that replaces it, COMPARED_ROWS rows at a time.

    Raises:
        InvalidRequest: they differ.
    """
    with ExitStack() as opened:
        slices: dict[str, Any] = {}
        for shard in shards:
            tensors = opened.enter_context(_open(shard))
            names = {family.embedding, family.head}.intersection(tensors.keys())
            slices |= {name: tensors.get_slice(name) for name in names}
        if family.head not in slices:
            return
        embedding, head = slices[family.embedding], slices[family.head]
        num_rows = embedding.get_shape()[0]
        if embedding.get_dtype() == head.get_dtype() and all(
            torch.equal(embedding[i : i + COMPARED_ROWS], head[i : i + COMPARED_ROWS])
            for i in range(0, num_rows, COMPARED_ROWS)
        ):
            return
    problem = f"{family.head} differs from {family.embedding}; set weight_tying to false in config.json"
    raise InvalidRequest("model", str(directory), f"weight_tying makes the embedding the head, but {problem}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _open(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(
            "model", str(shard), f"is truncated or not safetensors: {error}; download it again"
        ) from None
