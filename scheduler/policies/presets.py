"""Presets: published settings by name, and settings in a TOML file, as `remask study tune` writes them."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from remask.scheduler.errors import InvalidRequest, did_you_mean
from remask.scheduler.policies.remask import Rcr, Remdm, Saber, Wino
from remask.scheduler.policies.unmask import CappedThreshold, Dream, Schedule, Threshold

WHOLE = "whole"  # a block length in a file
WHOLE_CANVAS = 2**31 - 1  # a preset's block length is cut to the canvas
MAX_FILE_BYTES = 2**20

PRESETS: dict[str, dict[str, Any]] = {
    "llada": {"unmask": Schedule()},
    "fast-dllm": {"unmask": Threshold(0.9)},
    "fast-dllm-prefix": {"unmask": Threshold(0.9), "reuse": "prefix"},
    "fast-dllm-dual": {"unmask": Threshold(0.9), "reuse": "both"},
    "wino": {"unmask": CappedThreshold(0.6), "remask": Wino(0.9), "block_length": 128},
    "dream": {"unmask": Dream(steps=512, alg="origin")},
    "rcr": {"unmask": Schedule(), "remask": Rcr(), "block_length": WHOLE_CANVAS},
    "saber": {"remask": Saber(), "block_length": WHOLE_CANVAS},
    "remdm": {"remask": Remdm(), "temperature": 1.0, "top_p": 0.9, "block_length": WHOLE_CANVAS},
}


def is_file(preset: object) -> bool:
    """Whether a preset is the path of a file: a text with a separator, or one that ends in `.toml`."""
    return isinstance(preset, str) and ("/" in preset or "\\" in preset or preset.endswith(".toml"))


def preset_fields(preset: object) -> dict[str, Any]:
    """The fields of a preset, by name or from a file.

    Raises:
        InvalidRequest: there is no such preset, or its file cannot be read or sets `max_tokens`.
    """
    if not isinstance(preset, str):
        raise InvalidRequest("preset", preset, f"unknown preset; use one of {', '.join(PRESETS)}")
    if not is_file(preset):
        if preset not in PRESETS:
            raise InvalidRequest("preset", preset, f"unknown preset; {did_you_mean(preset, PRESETS)}")
        return PRESETS[preset]
    try:
        return _read(preset, Path(preset).stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest("preset", preset, f"cannot be read: {reason}") from None


@lru_cache(maxsize=64)
def _read(path: str, modified: int) -> dict[str, Any]:
    """The fields in a file that was modified at this time."""
    if Path(path).stat().st_size > MAX_FILE_BYTES:
        raise ValueError("it is no preset")
    fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if "max_tokens" in fields or "preset" in fields:
        raise ValueError("a preset sets neither max_tokens nor preset")
    if fields.get("block_length") == WHOLE:
        fields["block_length"] = WHOLE_CANVAS
    return fields
