"""Files of a run. Each is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet


def read_json(path: Path) -> Any:
    """The content of a file; None: it does not exist."""
    return msgspec.json.decode(path.read_bytes()) if path.exists() else None


def write_json(content: Any, path: Path) -> None:
    """Writes an indented JSON file."""
    own = _beside(path)
    own.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    own.replace(path)


def write_table(table: pyarrow.Table, path: Path) -> None:
    """Writes a Parquet file."""
    own = _beside(path)
    pyarrow.parquet.write_table(table, own, compression="zstd")
    own.replace(path)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.tmp")
