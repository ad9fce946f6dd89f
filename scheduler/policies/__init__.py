"""Decoding policies: their parameters and bounds, and the rows, memory and random numbers that they need.

Each policy has two halves. The *spec* here is what travels on the wire and what planning reads; the *kernel*
in `remask.workers.strategies` is the tensor function of the same name. What each policy computes is specified
by the papers and reference decoders named in the docstrings.
"""

from remask.scheduler.policies.base import MemoryField, Policy, RemaskPolicy, UnmaskPolicy, tag
from remask.scheduler.policies.registry import PRESETS, registry
from remask.scheduler.policies.remask import LowProb, OracleLoo, RandomRemask, Rcr, Remdm, Saber, Wino
from remask.scheduler.policies.unmask import (
    Bernoulli,
    CappedThreshold,
    Dream,
    EntropyBound,
    Factor,
    Schedule,
    Threshold,
)

__all__ = [
    "PRESETS",
    "Bernoulli",
    "CappedThreshold",
    "Dream",
    "EntropyBound",
    "Factor",
    "LowProb",
    "MemoryField",
    "OracleLoo",
    "Policy",
    "RandomRemask",
    "Rcr",
    "RemaskPolicy",
    "Remdm",
    "Saber",
    "Schedule",
    "Threshold",
    "UnmaskPolicy",
    "Wino",
    "registry",
    "tag",
]
