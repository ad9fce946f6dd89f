"""Tokenizers of vocab.json and merges.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from remask import InvalidRequest
from remask.byte_pairs import END, PUBLISHED
from remask.text import load_tokenizer

TEXT = "def solve(n):\n    return [i ** 2 for i in range(n)]  # 1234 squares, naïve\n" * 3
SAMPLES = ["def f(n): return n", "  1234 + 5 = ?\n\n", "naïve e\u0301tude, 日本", "it's we'll", ""]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer.model.save(str(folder))
    return folder


def copied(vocabulary: Path, folder: Path, config: dict[str, Any] | None = None) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((vocabulary / name).read_bytes())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_text_is_split_as_by_qwen2(vocabulary: Path, tmp_path: Path) -> None:
    own = load_tokenizer(copied(vocabulary, tmp_path), required=True)
    assert own is not None
    words = json.loads((vocabulary / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (vocabulary / "merges.txt").read_text().splitlines()[1:]]
    theirs = Qwen2Tokenizer(vocab=words, merges=merges)
    for sample in SAMPLES:
        ids = own.encode(sample, add_special_tokens=False)
        assert ids == theirs.encode(sample, add_special_tokens=False)
        assert all(token_id < len(words) for token_id in ids)
        assert own.decode(ids) == sample.replace("e\u0301", "\u00e9")  # composed by the normalizer


def test_published_tokens_follow_the_vocabulary(vocabulary: Path, tmp_path: Path) -> None:
    own = load_tokenizer(copied(vocabulary, tmp_path), required=True)
    assert own is not None
    count = len(json.loads((vocabulary / "vocab.json").read_text()))
    assert [own.convert_tokens_to_ids(token) for token in PUBLISHED] == list(range(count, count + 24))
    assert (own.eos_token, own.pad_token) == (END, END)
    marked = own.encode("<|im_start|>user\n1<|im_end|>", add_special_tokens=False)
    assert (marked[0], marked[-1]) == (count + 1, count + 2)
    assert own.decode(marked, skip_special_tokens=True) == "user\n1"


def test_the_configuration_names_other_tokens(vocabulary: Path, tmp_path: Path) -> None:
    count = len(json.loads((vocabulary / "vocab.json").read_text()))
    texts = [*PUBLISHED, "<|dlm_pad|>"]
    config = {
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": {
            str(count + place): {"content": text, "special": True} for place, text in enumerate(texts)
        },
        "pad_token": {"content": "<|dlm_pad|>"},
        "chat_template": "{{ messages[0].content }}",
    }
    own = load_tokenizer(copied(vocabulary, tmp_path, config), required=True)
    assert own is not None
    assert (own.pad_token, own.pad_token_id) == ("<|dlm_pad|>", count + 24)
    assert own.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "GPT2Tokenizer needs a tokenizer.json"),
        ({"added_tokens_decoder": {"5": {"content": "<|mask|>"}}}, "<|mask|> should have the id 5"),
    ],
)
def test_other_tokenizers_are_refused(
    vocabulary: Path, tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_tokenizer(copied(vocabulary, tmp_path, config), required=True)
    assert problem in str(caught.value)


def test_broken_files_are_refused(vocabulary: Path, tmp_path: Path) -> None:
    folder = copied(vocabulary, tmp_path)
    (folder / "vocab.json").write_text("[]")
    with pytest.raises(InvalidRequest, match=r"cannot be read: .*must hold a JSON object.*vocab\.json"):
        load_tokenizer(folder, required=True)
