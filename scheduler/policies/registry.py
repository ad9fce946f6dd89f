"""The registry of policies: those of remask and of installed packages.

A package adds policies with entry points of the group `remask.strategies`. The name of the entry point is the
policy's; its value is the spec, a subclass of `UnmaskPolicy` or `RemaskPolicy` with a `kernel`. Entry points
are loaded and checked when a policy is first looked up, and not at import, because a package imports remask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from remask.scheduler.policies import remask, unmask
from remask.scheduler.policies.base import Policy, RemaskPolicy, UnmaskPolicy, tag
from remask.scheduler.policies.checking import PolicyFault, check_policy

logger = logging.getLogger(__name__)

ENTRY_POINTS = "remask.strategies"


class Registry(NamedTuple):
    """Policies by name, and the faults of entry points that could not be used, by name."""

    unmask: dict[str, type[UnmaskPolicy]]
    remask: dict[str, type[RemaskPolicy]]
    broken: dict[str, str]


@cache
def registry() -> Registry:
    """The policies of this environment."""
    return load(entry_points(group=ENTRY_POINTS))


def load(entries: Iterable[EntryPoint]) -> Registry:
    """Loads the policies of remask and of entry points. An entry point that cannot be used is left out."""
    found = Registry({}, {}, {})
    for module in (unmask, remask):
        for value in vars(module).values():
            if isinstance(value, type) and value.__name__ in module.__all__:
                _add(found, value)
    for entry in entries:
        try:
            _add(found, check_policy(entry.load(), entry.name, {**found.unmask, **found.remask}))
        except (Exception, SystemExit) as error:  # an import may fail in any way
            package = f" of {entry.dist.name}" if entry.dist is not None else ""
            problem = str(error) if isinstance(error, PolicyFault) else repr(error)
            line = " ".join(f"entry point {entry.name} = {entry.value}{package}: {problem}".split())
            found.broken[entry.name] = line
            logger.warning("a policy is left out: %s", line)
    return found


def _add(found: Registry, policy: type[Policy]) -> None:
    if issubclass(policy, UnmaskPolicy):
        found.unmask[tag(policy)] = policy
    elif issubclass(policy, RemaskPolicy):
        found.remask[tag(policy)] = policy
