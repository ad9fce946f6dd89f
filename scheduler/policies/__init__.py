"""Decoding policies: their parameters and bounds, and the rows, memory and random numbers that they need.

Each policy has two halves. The *spec* is a struct in `unmask` or `remask` that travels on the wire and that
planning reads; the *kernel* is the tensor function of the policy's name in `remask.workers.strategies`. What
each policy computes is specified by the papers and reference decoders named in the docstrings.
"""

from remask.scheduler.policies import remask, unmask
from remask.scheduler.policies.base import MemoryField, Policy, RemaskPolicy, UnmaskPolicy, tag
from remask.scheduler.policies.presets import PRESETS
from remask.scheduler.policies.registry import registry
from remask.scheduler.policies.remask import *  # noqa: F403
from remask.scheduler.policies.unmask import *  # noqa: F403

__all__ = ["PRESETS", "MemoryField", "Policy", "RemaskPolicy", "UnmaskPolicy", "registry", "tag"]
__all__ += remask.__all__
__all__ += unmask.__all__
