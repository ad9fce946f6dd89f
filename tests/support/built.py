"""The wheel, built from the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "engine": "remask",
    "scheduler": "remask/scheduler",
    "workers": "remask/workers",
    "benchmarks": "remask/benchmarks",
}


def build_wheel(source: Path, target: Path) -> Path:
    """Builds the wheel.

    Args:
        source: an empty folder for a copy of the tree.
        target: a folder for the wheel.
    """
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):  # a build leaves files where it runs
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            target,
            source,
        ],
        check=True,
    )
    (built,) = target.glob("remask-*.whl")
    return built
