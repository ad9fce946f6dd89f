"""Loads a model from a directory: a transformer's checkpoint or a Markov chain."""

from __future__ import annotations

from pathlib import Path

from remask.scheduler.errors import InvalidRequest
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import Denoiser, load_denoiser
from remask.workers.models.loading import architecture_of, read_config, read_raw_config
from remask.workers.models.markov import ARCHITECTURE, load_markov


def read_model_config(directory: Path) -> ModelConfig:
    """The configuration of the model in a local directory; no weights are read.

    Raises:
        InvalidRequest: the directory is invalid.
    """
    raw = read_raw_config(directory)
    if architecture_of(raw) == ARCHITECTURE:
        return load_markov(raw, str(directory / "config.json")).config
    return read_config(directory)[1]


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: str = "auto",
    attention_backend: str = "auto",
    quantization: str | None = None,
) -> Denoiser:
    """The model in a local directory, ready to denoise; the arguments are those of `load_denoiser`.

    Raises:
        InvalidRequest: the device does not exist, or the directory is invalid.
    """
    raw = read_raw_config(directory)
    if architecture_of(raw) == ARCHITECTURE:
        for name, value, honoured in (
            ("dtype", dtype, ("auto", "float64")),
            ("device", device, ("auto", "cpu")),
            ("load_format", load_format, ("auto",)),
            ("attention_backend", attention_backend, ("auto",)),
            ("quantization", quantization, (None,)),
        ):
            if value not in honoured:
                fix = f"a Markov chain takes only {' or '.join(map(str, honoured))}"
                raise InvalidRequest(name, value, fix)
        return load_markov(raw, str(directory / "config.json"))
    return load_denoiser(
        directory,
        dtype=dtype,
        device=device,
        load_format=load_format,
        attention_backend=attention_backend,
        quantization=quantization,
    )
