"""Parsed `config.json`: ids and lengths of a model, and the shape of a transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remask.scheduler.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts about a model that requests depend on.

    Attributes:
        vocab_size: ids a request may use.
        max_len: largest sequence (prompt and canvas) in tokens.
        eos_ids: ids that end a text.
        eot_id: id that ends a turn; None: the config names none.
        turn_ends: texts of tokens that end a turn, if the tokenizer has them and `eot_id` is None.
        shift: offset of the row that predicts a position: row i - shift predicts position i.
    """

    vocab_size: int
    max_len: int
    mask_id: int
    eos_ids: tuple[int, ...]
    eot_id: int | None
    turn_ends: tuple[str, ...] = ()
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The experts of each layer.

    Attributes:
        count, num_active: experts, and how many of them a row is sent to.
        size: hidden size of an expert.
        shared_size: that of an MLP that every row takes as well; None: there is none.
    """

    count: int
    num_active: int
    size: int
    shared_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The shape of a masked diffusion transformer.

    Attributes:
        family: name of its family.
        embedding_size: rows of the embedding and the head; at least `vocab_size`.
        ffn_size: hidden size of the MLPs; with experts that of one expert.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether each head's queries and keys are normalised before RoPE.
        experts: None: every layer has one MLP.
        dtype: "float32", "bfloat16" or "float16"; None: not said, the tensors' own.
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
    dtype: str | None
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: ExpertsConfig | None = None
    family: str = ""


class ConfigReader:
    """Checked values of a `config.json`.

    Args:
        raw: the parsed file.
        source: its path, for errors.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self._source = raw, source

    def refuse(self, problem: str) -> InvalidRequest:
        """The error for a file with a problem."""
        return InvalidRequest("model", self._source, problem)

    def expect(self, family: str, expected: Mapping[str, tuple[object, ...]]) -> None:
        """Raises InvalidRequest for keys that ask for something that is not computed.

        Args:
            family: its name.
            expected: supported values by key; a missing key is supported.
        """
        differing = [
            f"{key} = {self.raw[key]!r} (supported: {', '.join(map(repr, allowed))})"
            for key, allowed in expected.items()
            if key in self.raw and self.raw[key] not in allowed
        ]
        if differing:
            raise self.refuse(f"this {family} variant is not supported: {'; '.join(differing)}")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.refuse(f"config key {key!r} must be a positive integer")
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(f"config key {key!r} must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, bool):
            raise self.refuse(f"config key {key!r} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids: tuple[Any, ...] = tuple(value) if isinstance(value, list) else (value,)
        if not ids or any(
            not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size for i in ids
        ):
            raise self.refuse(f"config key {key!r} must be an id below {vocab_size}, not {value!r}")
        return ids

    def special_ids(self, vocab_size: int) -> dict[str, Any]:
        """`mask_id`, `eos_ids` and `eot_id`."""
        mask_ids, eos_ids = (
            self.token_ids("mask_token_id", vocab_size),
            self.token_ids("eos_token_id", vocab_size),
        )
        eot_id = (
            self.token_ids("eot_token_id", vocab_size)[0]
            if self.raw.get("eot_token_id") is not None
            else None
        )
        if len(mask_ids) != 1 or mask_ids[0] in (*eos_ids, eot_id):
            problem = f"mask_token_id {self.raw['mask_token_id']!r} must be one id that does not end a text"
            raise self.refuse(problem)
        return {"mask_id": mask_ids[0], "eos_ids": eos_ids, "eot_id": eot_id}

    def heads(
        self, hidden: str, heads: str, kv_heads: str, default_kv_heads: int | None = None
    ) -> dict[str, int]:
        """`hidden_size`, `num_heads`, `num_kv_heads` and `head_dim`.

        Args:
            hidden, heads, kv_heads: keys of the first three.
            default_kv_heads: number of key heads if its key is missing; None: the key is required.
        """
        hidden_size, num_heads = self.positive(hidden), self.positive(heads)
        num_kv_heads = self.positive(kv_heads, default_kv_heads)
        if hidden_size % num_heads or (hidden_size // num_heads) % 2 or num_heads % num_kv_heads:
            sizes = f"{hidden} {hidden_size}, {heads} {num_heads}, {kv_heads} {num_kv_heads}"
            raise self.refuse(f"{sizes} do not make even heads")
        return {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": hidden_size // num_heads,
        }

    @property
    def dtype(self) -> str | None:
        return self.raw.get("torch_dtype") or self.raw.get("dtype")
