"""`remask models`: the supported model families, and a check of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remask.embedded import model_directory


def models(
    directory: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint directory to check, or 'tiny'.  [default: list the families]"),
    ] = None,
) -> None:
    """List the supported model families, or check a checkpoint without reading its weights.

    A checkpoint that cannot be loaded is an error that lists what is missing or wrong.
    """
    from remask.workers.models.families import families

    if directory is None:
        for architecture, family in families().items():
            typer.echo(f"{architecture:20} {family.name}")
        return
    with model_directory(directory) as own:
        lines = checked(own)
    for name, value in lines:
        typer.echo(f"{name:20} {value}")


def checked(directory: Path) -> list[tuple[str, str]]:
    """What a checkpoint is, line by line.

    Raises:
        InvalidRequest: it cannot be loaded.
    """
    from remask.text import load_tokenizer
    from remask.workers.models.loading import DTYPES, check_checkpoint

    found = check_checkpoint(directory)
    config, count = found.config, found.num_parameters
    tokenizer = load_tokenizer(directory, required=False)
    lines = [
        ("folder", str(directory)),
        ("family", found.family.name),
        ("parameters", f"{count:,} in {len(found.names):,} tensors, {found.stored_dtype}"),
        (
            "shape",
            f"{config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads on "
            f"{config.num_kv_heads} key heads, vocabulary of {config.vocab_size:,}",
        ),
    ]
    if config.experts is not None:
        experts = config.experts
        lines.append(("experts", f"{experts.num_active} of {experts.count}, of size {experts.size}"))
    return [
        *lines,
        ("longest sequence", f"{config.max_len:,} tokens"),
        ("mask, end of text", f"{config.mask_id}; {', '.join(map(str, config.eos_ids))}"),
        (
            "memory of weights",
            ", ".join(
                f"{count * dtype.itemsize / 2**30:.1f} GiB in {name}" for name, dtype in DTYPES.items()
            ),
        ),
        (
            "tokenizer",
            "none: prompts must be token ids" if tokenizer is None else f"{len(tokenizer):,} tokens",
        ),
        ("chat template", "yes" if getattr(tokenizer, "chat_template", None) else "no"),
    ]
