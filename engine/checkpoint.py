"""What is read of a checkpoint in the process of the engine: its tokenizer and its configuration."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from remask.embedded import model_directory
from remask.intake import Intake
from remask.options import EngineOptions
from remask.text import load_tokenizer
from remask.workers.models.loading import read_config


def read_tokenizer(options: EngineOptions, directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the options name, else that of the checkpoint; None if it has none.

    Raises:
        InvalidRequest: it cannot be read, or the options name one that is not there.
    """
    own = options.tokenizer
    return load_tokenizer(directory if own is None else Path(own), required=own is not None)


def intake_of(options: EngineOptions) -> Intake:
    """The intake of a model that is not loaded: it reads the configuration and the tokenizer alone.

    Raises:
        InvalidRequest: as the constructor of `LLM`, for what these two files decide.
    """
    with model_directory(options.model) as directory:
        tokenizer, (_, config) = read_tokenizer(options, directory), read_config(directory)
    return Intake(config, tokenizer, options)
