"""The environment stamp of a report, and whether the machine was steady."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from remask.benchmarks.gpu.timing import gemm_flops_per_second
from remask.workers.startup.device import device_name

UNSTEADY = 0.1  # change of the matrix rate that is reported
SQUARE = 1024  # of the product that it is measured with
PACKAGES = ("remask", "torch", "triton", "transformers", "ray", "numpy")


def environment_stamp() -> dict[str, Any]:
    """CPU and its vector units, GPU, versions, threads and commit.

    The commit is the environment variable `REMASK_COMMIT` if set (for a copy of a checkout), else the
    checkout's commit, else None.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    if given := os.environ.get("REMASK_COMMIT"):
        return given
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def unfinished(done: int, asked: int, what: str) -> list[str]:
    """The note of a report that was saved before the measurement finished; empty for a finished one."""
    return [] if done == asked else [f"Not finished: {done} of {asked} {what}."]


class Steadiness:
    """Whether the speed of the machine changed: samples of the rate of a matrix product."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.look()

    def look(self) -> None:
        """Measures the rate once more; a fifth of a second."""
        self.rates.append(gemm_flops_per_second(self._device, SQUARE))

    def notes(self) -> list[str]:
        """Notes for the report; empty if the machine was steady."""
        change = max(self.rates) / min(self.rates) - 1
        if change <= UNSTEADY:
            return []
        return [
            f"The machine was busy or slowed down: its matrix rate changed by {100 * change:.0f} % "
            f"meanwhile (from {min(self.rates) / 1e9:.0f} to {max(self.rates) / 1e9:.0f} GFLOP/s)."
        ]
