"""Tokenizers of `vocab.json` and `merges.txt`, as Dream and DiffuCoder publish them: Qwen2's byte pairs and
pre-tokenizer, with special tokens of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, Qwen2Tokenizer

from remask.workers.models.loading import read_json

CLASSES = ("DreamTokenizer", "Qwen2Tokenizer")  # of `tokenizer_config.json`
# The tokens behind the vocabulary, in the order of their ids (151643 on, for the published vocabulary).
PUBLISHED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|beginoftext|>",
    "<|mask|>",
)  # fmt: skip
PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>")  # fmt: skip
END = "<|endoftext|>"
NAMED = (
    "bos_token",
    "eos_token",
    "pad_token",
    "chat_template",
)  # fields that `tokenizer_config.json` may set


def byte_pair_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Special tokens are those of `tokenizer_config.json`
    (`added_tokens_decoder`), else the published ones.

    Raises:
        InvalidRequest: a file is no JSON object.
        ValueError: the files are of another tokenizer, or their ids contradict each other.
    """
    about = directory / "tokenizer_config.json"
    config = read_json(about) if about.is_file() else {}
    name = str(config.get("tokenizer_class") or CLASSES[0]).removesuffix("Fast")
    if name not in CLASSES:
        raise ValueError(f"{name} needs a tokenizer.json; vocab.json is read for {' and '.join(CLASSES)}")
    vocabulary: dict[str, int] = read_json(directory / "vocab.json")
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    added = _added(config, len(vocabulary))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
    tokenizer.add_tokens([added[token_id] for token_id in sorted(added)])
    for token_id, token in added.items():
        if (found := tokenizer.convert_tokens_to_ids(token.content)) != token_id:
            raise ValueError(f"{token.content} should have the id {token_id}, and has {found}")
    for name in NAMED:
        if config.get(name) is not None:
            setattr(tokenizer, name, _text(config[name]))
    template = directory / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _added(config: dict[str, Any], num_pairs: int) -> dict[int, AddedToken]:
    """The tokens behind the vocabulary, by id."""
    if listed := config.get("added_tokens_decoder"):
        names = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
        return {
            int(token_id): AddedToken(**{name: token[name] for name in names if name in token})
            for token_id, token in listed.items()
        }
    return {
        num_pairs + place: AddedToken(text, special=text not in PLAIN, normalized=False)
        for place, text in enumerate(PUBLISHED)
    }


def _text(value: Any) -> Any:
    """A token's text, which may stand in an object."""
    return value["content"] if isinstance(value, dict) and "content" in value else value
