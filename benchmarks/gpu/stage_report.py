"""The sizes of a stage, and what it has measured so far."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.gpu.run import KEYS
from remask.benchmarks.throughput import write_report

Part: TypeAlias = Callable[[], dict[str, Any]]


class Sizes:
    """Sizes of everything that is measured: full size, or reduced for `--small`."""

    def __init__(self, small: bool) -> None:
        self.model = "tiny" if small else "llada-8b"
        self.equal_model = "tiny" if small else "llada-124m"
        self.square = 512 if small else 8192
        self.copy_bytes = 1 << 24 if small else 1 << 30
        self.steps = {4096: 256, 8192: 512} if small else {4096: 4096, 8192: 8192}  # key -> rows
        self.sequence = (32, 32) if small else (128, 128)  # prompt and canvas of packed steps
        self.single = (32, 32) if small else (128, 256)
        self.single_steps = 8 if small else 64
        self.num_kinds = 2 if small else 8  # requests of each kind that share a step
        self.num_mixed = 3 if small else 64
        self.num_reusing = 2 if small else 16
        self.num_equal = 3 if small else 6
        self.num_golden = 3 if small else None
        self.rows = (64, 256) if small else tuple(64 << i for i in range(8))
        self.requests = (1, 2) if small else (1, 4, 16, 64)
        self.repetitions = 1 if small else 3


class Report:
    """What a stage has measured so far, written after every part."""

    def __init__(self, path: Path, budget_seconds: float) -> None:
        self.content: dict[str, Any] = {
            "environment": environment_stamp(),
            "figures": {},
            "parts": {},
            "errors": {},
            "part_seconds": {},
            "unfinished": [],
        }
        self.path, self._end = path, time.perf_counter() + budget_seconds

    def seconds_left(self) -> float:
        return self._end - time.perf_counter()

    def plan(self, *names: str) -> None:
        """Names the parts of the stage; each is unfinished until it has run."""
        self.content["unfinished"] = list(names)
        write_report(self.content, self.path)

    def part(self, name: str, measure: Part) -> None:
        """Runs one part if there is time. An error ends the part, not the stage."""
        if self.seconds_left() <= 0:
            return
        began = time.perf_counter()
        try:
            result = measure()
            self.content["parts"][name] = result
            self.content["figures"] |= {key: result[key] for key in KEYS if key in result}
        except Exception as error:
            self.content["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        self.content["unfinished"].remove(name)
        self.content["part_seconds"][name] = round(time.perf_counter() - began, 1)
        write_report(self.content, self.path)
        shown = {key: self.content["figures"][key] for key in KEYS if key in self.content["figures"]}
        sys.stdout.write(f"{name}: {time.perf_counter() - began:.1f} s {json.dumps(shown)}\n")
        sys.stdout.flush()
