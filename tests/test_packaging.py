"""The wheel: everything of the tree, nothing else, and it runs the demo in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "engine": "remask",
    "scheduler": "remask/scheduler",
    "workers": "remask/workers",
    "benchmarks": "remask/benchmarks",
}
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
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


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With exactly the dependencies that its metadata names, at the pinned versions."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel]
    subprocess.run([*install, "--constraint", ROOT / "requirements-dev.lock"], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    where = subprocess.run(
        [python, "-c", "import remask, json; print(json.dumps(remask.__file__))"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(json.loads(where.stdout)).is_relative_to(home)
    demo = subprocess.run(
        [python, "-m", "remask.benchmarks.tiny.demo", "--count", "4", "--grids", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert demo.returncode == 0, demo.stderr
    for policy in ("one token a step", "threshold 0.7", "WINO 0.7/0.9"):
        assert policy in demo.stdout
    command = subprocess.run(
        [home / "bin" / "remask", "generate", "1234.34......2.3=", "--max-tokens", "16"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert command.returncode == 0, command.stderr
    assert "NFE" in command.stdout
