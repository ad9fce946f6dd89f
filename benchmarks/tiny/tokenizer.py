"""The tiny model's vocabulary: three special ids, then one for every byte, so that any text fits."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MASK, EOS, EOT = "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"
SPECIALS = (MASK, EOS, EOT)
MASK_ID, EOS_ID, EOT_ID = range(len(SPECIALS))
VOCAB_SIZE = len(SPECIALS) + 256

# A user's message becomes the message and `=`; an assistant's is the answer and the end-of-turn id.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{{ '=' if message['role'] == 'user' else eot_token }}"
    "{% endfor %}"
)


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: one token a byte of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def save(directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template) for transformers."""
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "eos_token": EOS,
        "pad_token": EOS,
        "eot_token": EOT,
        "extra_special_tokens": {"eot_token": EOT},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
