"""remask as a model of the Language Model Evaluation Harness, on tasks with local data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remask import InvalidRequest

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]
SUMS = [("123+456=", "0579"), ("111+222=", "0333"), ("250+250=", "0500"), ("401+508=", "0909")]
TASKS = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
WRITES = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["x"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
CHOOSES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks on the tiny model's sums."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = [
        {"question": question, "answer": answer, "choices": [f"{int(answer) + 1:04}", answer, "7"]}
        for question, answer in SUMS
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("sums_written", WRITES), ("sums_chosen", CHOOSES)):
        (tmp_path / f"{name}.yaml").write_text(TASKS.format(name=name, data=data) + kind)
    return tmp_path


def results(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "out").rglob("results*.json")
    return json.loads(path.read_text())


def test_the_harness_scores_texts_and_choices(remask: Command, tasks: Path) -> None:
    run = remask(
        "eval",
        *("--tasks", "sums_written,sums_chosen", "--include_path", tasks),
        *("--model_args", "model=tiny,num_samples=16,unmask=threshold:0.9,max_num_rows=512"),
        *("--output_path", tasks / "out", "--log_samples"),
    )
    assert run.returncode == 0, run.stderr
    found = results(tasks)
    assert found["results"]["sums_written"]["exact_match,none"] == 1.0
    assert found["results"]["sums_chosen"]["acc,none"] == 1.0
    assert "remask" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"model": "tiny", "unmsk": "threshold"}, "unmsk"),
        ({"max_num_rows": 512}, "model_args"),
        ({"model": "tiny", "num_samples": 1}, "num_samples"),
        ({"model": "tiny", "stop": "x"}, "stop"),
    ],
)
def test_bad_model_arguments_are_refused_by_name(arguments: dict[str, Any], parameter: str) -> None:
    from remask.harness import RemaskLM

    with pytest.raises(InvalidRequest) as caught:
        RemaskLM(**arguments)
    assert caught.value.parameter == parameter
