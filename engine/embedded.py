"""Where a model's name leads: to the embedded model, or to a checkpoint directory of the caller's."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

EMBEDDED = "tiny"


def is_embedded(model: str | Path) -> bool:
    """Whether a name is the embedded model's: "tiny", or that as a path if no such directory exists."""
    return model == EMBEDDED or (Path(model) == Path(EMBEDDED) and not Path(EMBEDDED).is_dir())


@contextmanager
def model_directory(model: str | Path) -> Generator[Path, None, None]:
    """The checkpoint directory of a model's name."""
    with as_file(files("remask") / EMBEDDED) as embedded:
        yield embedded if is_embedded(model) else Path(model)


def absolute_name(model: str | Path) -> str:
    """A name that leads to the model from any folder; a relative path is the caller's."""
    return str(model) if is_embedded(model) else str(Path(model).absolute())
