"""Model families, one file each: how a `config.json` is read, which tensors there are and where they go, and
the facts in which the family differs.

A package adds a family with an entry point of the group `remask.models`, whose value is a `Family`. Entry
points are loaded when a checkpoint is first read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from remask.workers.models.families import dream, llada, llada_moe
from remask.workers.models.families.base import Family, layer_names

logger = logging.getLogger(__name__)

ENTRY_POINTS = "remask.models"
OWN = (llada.FAMILY, dream.FAMILY, llada_moe.FAMILY)

__all__ = ["Family", "families", "layer_names", "load"]


@cache
def families() -> dict[str, Family]:
    """The families of this environment by architecture."""
    return load(entry_points(group=ENTRY_POINTS))


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
