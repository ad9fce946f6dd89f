"""Model families, one file each: how a `config.json` is read, which tensors there are and where they go, and
the facts in which the family differs.

A package adds a family with an entry point of the group `remask.models`, whose value is a `Family`. Entry
points are loaded when a checkpoint is first read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from remask.workers.models.families import dream, llada, llada_moe
from remask.workers.models.families.base import Family, layer_names

logger = logging.getLogger(__name__)

ENTRY_POINTS = "remask.models"
OWN = (llada.FAMILY, dream.FAMILY, llada_moe.FAMILY)

# Known models that no family here computes: how their architectures begin or end, what they are, and why not.
_BLOCK_CAUSAL = "its blocks attend to themselves and to those before them, not to the whole canvas"
OTHERS = (
    (r"^LLaDA2", "LLaDA2.x", _BLOCK_CAUSAL),
    (r"^SDAR", "SDAR", _BLOCK_CAUSAL),
    (r"^Fast_?dLLM", "Fast-dLLM v2", _BLOCK_CAUSAL),
    (r"^DiffusionGemma", "DiffusionGemma", "a causal encoder reads its prompts, and a decoder the canvas"),
    (r"ForCausalLM$", "by its name an autoregressive model", "tokens of one do not attend to later ones"),
)

__all__ = ["Family", "families", "layer_names", "load", "refusal_of"]


@cache
def families() -> dict[str, Family]:
    """The families of this environment by architecture."""
    return load(entry_points(group=ENTRY_POINTS))


def refusal_of(architecture: str | None) -> str:
    """Why a checkpoint of an architecture that has no family is refused."""
    supported = f"supported: {', '.join(families())}"
    for pattern, name, reason in OTHERS:
        if re.search(pattern, architecture or ""):
            return f"{architecture!r} is {name}, which is not supported: {reason}; {supported}"
    return f"architecture {architecture!r} is not supported; {supported}"


def load(entries: Iterable[EntryPoint]) -> dict[str, Family]:
    """remask's own families and those of entry points, by architecture. An entry point that cannot be used,
    or that claims an architecture of another one, is left out."""
    found = {architecture: family for family in OWN for architecture in family.architectures}
    for entry in entries:
        try:
            family = entry.load()
            if not isinstance(family, Family):
                raise TypeError(f"{family!r} is no remask.workers.models.families.Family")
            if taken := [name for name in family.architectures if name in found]:
                raise ValueError(f"{', '.join(taken)} belongs to {found[taken[0]].name}")
        except (Exception, SystemExit) as error:  # an import may fail in any way
            logger.warning("a model family is left out: entry point %s: %r", entry.name, error)
            continue
        found |= dict.fromkeys(family.architectures, family)
    return found
