"""Shared by all tests: one thread (what CI has), the golden cases, and models loaded once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built import build_wheel

from remask import LLM
from remask.cli import main
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

GOLDEN = Path(__file__).parent / "data" / "golden"

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the knee that tests measure out of the user's cache, for reading and for writing."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _ray_of_its_own() -> Iterator[None]:
    """Keeps the address of a cluster from tests in other processes, which would join it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    return GOLDEN / "llada-tiny"


@pytest.fixture(scope="session")
def golden_cases() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "llada_decoding.json").read_text())["cases"]


@pytest.fixture(scope="session")
def golden_model(golden_checkpoint: Path) -> TransformerDenoiser:
    return load_denoiser(golden_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def golden_llm(golden_checkpoint: Path) -> Iterator[LLM]:
    with LLM(golden_checkpoint, dtype="float32", device="cpu", max_num_rows=4096) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny_llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_rows=4096) as llm:
        yield llm


@pytest.fixture
def remask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, in this process: `remask("generate", "1+1=", stdin="")`."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["remask", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, captured.out, captured.err)

    return run
