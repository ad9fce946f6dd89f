"""Names of the embedded model, and paths that stand for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from remask import LLM, InvalidRequest
from remask.batch.identity import model_digest
from remask.benchmarks.throughput import find_model
from remask.embedded import model_directory

NAMES = ("tiny", "tiny/", "./tiny", Path("tiny"))


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_has_a_name_that_may_be_a_path(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with model_directory("tiny") as embedded, model_directory(name) as directory:
        assert directory == embedded
    assert model_digest(name) == model_digest("tiny")
    assert find_model(str(name)) == find_model("tiny")
    with LLM(name, device="cpu", max_num_rows=512) as llm:
        assert llm.generate("123+456=", {"max_tokens": 8})[0].outputs[0].text == "0579"


def test_a_directory_called_tiny_is_meant_by_a_path_and_not_by_the_name(
    golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden_checkpoint, "tiny")
    for name in NAMES[1:]:
        with model_directory(name) as directory:
            assert directory == Path("tiny")
        assert model_digest(name) == model_digest(golden_checkpoint)
    with model_directory("tiny") as directory:
        assert directory != Path("tiny")


def test_other_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Tiny", Path("models/tiny"), "tiny/config.json"):
        with pytest.raises(InvalidRequest, match="model: is not a directory"):
            LLM(name, device="cpu")
