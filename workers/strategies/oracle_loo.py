"""WINO's verification with exact leave-one-out probabilities, which copies of the sequence give."""

from __future__ import annotations

from remask.workers.strategies.wino import wino

oracle_loo = wino
