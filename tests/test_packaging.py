"""The wheel: everything of the tree, nothing else, and it runs the demo in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from built import PACKAGES
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = ("benchmarks/results/",)  # measurements; nothing at run time reads them


def tree() -> set[str]:
    """What the wheel must hold, from the files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = [name for name in listed if (ROOT / name).is_file() and not name.startswith(NOT_PACKAGED)]
    return {PACKAGES[name.split("/")[0]] + name.removeprefix(name.split("/")[0]) for name in files}


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == tree()


def test_the_embedded_model_is_within_its_limits() -> None:
    from safetensors.torch import load_file

    files = [
        ROOT / "engine" / "tiny" / name for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    tensors = load_file(files[1])
    assert 2_000_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 3_800_000
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}


def test_the_metadata_names_license_dependencies_and_the_flash_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"torch", "transformers", "ray", "msgspec", "safetensors", "numpy", "typer", "rich"}
    assert project["license"] == "Apache-2.0"
    assert project["optional-dependencies"]["flash"] == ["flash-attn>=2.7"]


def named_distributions(wheel: Path) -> dict[str, Distribution]:
    """What the wheel's metadata asks for, and what that asks for, as it is installed here."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, Distribution] = {}
    while asked:
        requirement = Requirement(asked.pop())
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name.lower() not in found:
            found[requirement.name.lower()] = distribution(requirement.name)
            asked += distribution(requirement.name).requires or []
    return found


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With exactly the dependencies that its metadata names: an environment of links to what is installed."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    for found in named_distributions(wheel).values():
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(found.locate_file(name))))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    environment.pop("PYTHONPATH", None)

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import remask; print(remask.__file__)").strip()
    assert Path(where).is_relative_to(home)
    assert not list(site.glob("pytest*")), "nothing else is there"
    demo = run(python, "-m", "remask.benchmarks.tiny.demo", "--count", "16")
    page = (ROOT / "docs" / "tiny-model.md").read_text()
    drawn = page[page.index("╭") : page.rindex("╯") + 1]
    assert {line.rstrip() for line in drawn.splitlines()} <= {line.rstrip() for line in demo.splitlines()}
    for policy in ("one token a step", "threshold 0.7", "WINO 0.7/0.9"):
        assert policy in demo
    assert "NFE" in run(home / "bin" / "remask", "generate", "1234.34......2.3=", "--max-tokens", "16")
