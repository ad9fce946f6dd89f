"""What is read of a checkpoint in the process of the engine: its tokenizer and its configuration."""

from __future__ import annotations

from pathlib import Path

from remask.embedded import model_directory
from remask.intake import Intake
from remask.options import EngineOptions
from remask.text import load_tokenizer
from remask.workers.models.load import read_model_config


def read_intake(options: EngineOptions, directory: Path) -> Intake:
    """The intake of the model in a directory, with the tokenizer that the options name, else its own.

    Raises:
        InvalidRequest: a file cannot be read, or an option does not suit the model.
    """
    own = options.tokenizer
    tokenizer = load_tokenizer(directory if own is None else Path(own), required=own is not None)
    return Intake(read_model_config(directory), tokenizer, options)


def intake_of(options: EngineOptions) -> Intake:
    """The intake of a model that is not loaded: it reads the configuration and the tokenizer alone.

    Raises:
        InvalidRequest: as the constructor of `LLM`, for what these two files decide.
    """
    with model_directory(options.model) as directory:
        return read_intake(options, directory)
