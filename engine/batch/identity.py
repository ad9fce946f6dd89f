"""The identity of a run, made of the input, the model and the parameters.

Every result has it in its id, `batch_req_<run>_<index>`. The index counts the requests of the input from 0.
An output file therefore identifies its run and its results without a second file.
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
SAMPLE_BYTES = 2**16  # read at the start, middle and end of a large file of the checkpoint


class RunName(NamedTuple):
    """Eight hex digits for each of the three inputs that determine the results of a run."""

    input: str
    model: str
    parameters: str

    def id(self, index: int) -> str:
        """Id of a result."""
        return f"{PREFIX}{''.join(self)}_{index}"

    def difference(self, other: RunName) -> str:
        """Description of what another run differs in."""
        names = {"input": "another input", "model": "another model", "parameters": "other parameters"}
        fields = zip(self._fields, self, other, strict=True)
        return " and ".join(names[name] for name, mine, its in fields if mine != its)


def parse_id(text: str) -> tuple[RunName, int] | None:
    """Run and index in the id of a result; None if it has another form."""
    found = _ID.match(text)
    return (RunName(*found.groups()[:3]), int(found[4])) if found else None


def parameters_digest(parameters: Mapping[str, Any]) -> str:
    """Digest of the parameters that apply to every line."""
    return _short(msgspec.json.encode(dict(parameters), order="sorted"))


def model_digest(model: str | Path) -> str:
    """Digest of the names, the sizes and samples of the files of a checkpoint directory, not of its path.

    It reads about 200 kilobytes of each file. Training changes every weight, so samples distinguish
    checkpoints.
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
