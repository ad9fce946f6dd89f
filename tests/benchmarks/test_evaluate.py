"""The embedded checkpoints: they know their tasks, and the twin is as large as tiny."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from remask import LLM
from remask.benchmarks.throughput import find_model
from remask.benchmarks.tiny.evaluate import TWIN_DIRECTORY, evaluate, evaluate_twin
from remask.benchmarks.tiny.tasks import ADDITION, PUZZLES
from remask.benchmarks.tiny.text import TEXT

COUNT = 16


@pytest.mark.slow
@pytest.mark.parametrize("name", PUZZLES)
def test_the_embedded_model_knows_its_puzzles(name: str) -> None:
    with LLM("tiny") as llm:
        result = evaluate(llm, PUZZLES[name], "one token a step", COUNT)
    assert result["score"] >= 0.9
    assert result["nfe"] == PUZZLES[name].answer_len + 4
    assert result["count"] == COUNT


@pytest.mark.slow
def test_the_embedded_model_spells_its_text() -> None:
    with LLM("tiny") as llm:
        assert evaluate(llm, TEXT, "one token a step", COUNT)["score"] >= 0.8


def test_the_embedded_twin_adds_and_stops() -> None:
    result = evaluate_twin(TWIN_DIRECTORY, ADDITION, COUNT)
    assert result["score"] >= 0.9
    assert result["nfe"] == ADDITION.answer_len + 1


def test_both_checkpoints_have_the_same_size_and_at_most_8_megabytes() -> None:
    tiny, _ = find_model("tiny")
    sizes = [(directory / "model.safetensors").stat().st_size for directory in (tiny, TWIN_DIRECTORY)]
    assert max(sizes) <= 8_000_000
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    num_parameters = AutoModelForCausalLM.from_pretrained(TWIN_DIRECTORY).num_parameters()
    assert sizes[0] == pytest.approx(2 * num_parameters, rel=0.01), "bf16"
