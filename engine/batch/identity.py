"""Which run a result belongs to: a name made of the input, the model and the parameters.

Every result carries it in its id, `batch_req_<run>_<index>`, where the index counts the requests of the input
from 0. So an output file says by itself whose it is and what it holds; no second file can be lost or swapped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from remask.embedded import model_directory

PREFIX = "batch_req_"
_ID = re.compile(rf"{PREFIX}([0-9a-f]{{8}})([0-9a-f]{{8}})([0-9a-f]{{8}})_(0|[1-9][0-9]*)\Z")
SAMPLE_BYTES = 2**16  # read at the start, the middle and the end of a large file of the model


class RunName(NamedTuple):
    """Eight hex digits each for the three things that decide what a run writes."""

    input: str
    model: str
    parameters: str

    def id(self, index: int) -> str:
        """The id of a result."""
        return f"{PREFIX}{''.join(self)}_{index}"

    def difference(self, other: RunName) -> str:
        """What another run differs in, for a person."""
        told = {"input": "another input", "model": "another model", "parameters": "other parameters"}
        fields = zip(self._fields, self, other, strict=True)
        return " and ".join(told[name] for name, mine, its in fields if mine != its)


def parse_id(text: str) -> tuple[RunName, int] | None:
    """Run and index of a result's id; None: it is no such id."""
    found = _ID.match(text)
    return (RunName(*found.groups()[:3]), int(found[4])) if found else None


def parameters_digest(parameters: Mapping[str, Any]) -> str:
    """Digest of what the command line says about every line."""
    return _short(msgspec.json.encode(dict(parameters), order="sorted"))


def model_digest(model: str | Path) -> str:
    """Digest of a checkpoint directory, wherever it lies: names, sizes, and samples of the files.

    Some 200 kilobytes a file are read, however large it is; training changes every weight, so samples tell
    one checkpoint from the next.
    """
    digest = hashlib.blake2b(digest_size=16)
    with model_directory(model) as directory:
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():  # LLM refuses a wrong one
            if path.suffix not in (".json", ".safetensors", ".jinja") or not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                for start in sorted({0, max(0, size // 2), max(0, size - SAMPLE_BYTES)}):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:8]


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()
