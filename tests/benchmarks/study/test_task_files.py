"""Task files: what a row says, checkers, and everything that is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remask import LLM, InvalidRequest
from remask.benchmarks.study.checkers import CHECKERS, checker_of
from remask.benchmarks.study.grid import cells, read_grid, tasks_of
from remask.benchmarks.study.samples import rows_of
from remask.benchmarks.study.sandbox import CheckFailed, Sandbox
from remask.benchmarks.study.task_files import FileTask

GOOD = {"prompt": "123+456=", "answer": "0579"}


def task_of(path: Path, *rows: Any, **options: Any) -> FileTask:
    file = path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return FileTask(file, "tiny", **options)


@pytest.mark.parametrize(
    ("checker", "text", "answer", "right"),
    [
        ("exact", " 0579\n", "0579", True),
        ("exact", "0579.", "0579", False),
        ("contains", "It is Paris, surely.", "Paris", True),
        ("contains", "It is Rome.", "Paris", False),
        ("number", "12 + 5 make 17, so 1,017.50 in all.", "$1017.5", True),
        ("number", "17 or 18", "17", False),
        ("number", "no figure", "17", False),
        ("number", "about -.5", "-0.50", True),
        ("regex", "x = 12", r"x\s*=\s*1\d", True),
        ("regex", "x = 22", r"x\s*=\s*1\d", False),
        ("multiple_choice", "A train leaves. The answer is (B).", "B", True),
        ("multiple_choice", "(C) because (B) is wrong. Answer: C", "(C)", True),
        ("multiple_choice", "B) since A is false", "B", True),
        ("multiple_choice", "I weigh (A) and (D)", "D", True),
        ("multiple_choice", "A train leaves", "A", False),
        ("multiple_choice", "b", "B", False),
    ],
)
def test_checkers_judge_by_their_rules(checker: str, text: str, answer: str, right: bool) -> None:
    assert CHECKERS[checker](text, {"answer": answer}) == right


def test_canvases_are_those_of_the_row_the_task_or_the_longest_answer(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "1+1=", "answer": "0002", "max_tokens": 30}, {"prompt": "x", "answer": "123456"}]
    task = task_of(tmp_path, *rows)
    assert (task.canvas_len, task.num_prompts) == (30, 3)
    assert [task.canvas_of(row["prompt"]) for row in rows] == [10, 30, 10]
    assert task_of(tmp_path, *rows, max_tokens=12).canvas_of("x") == 12


def test_the_prompts_of_a_seed_stay_if_there_are_more(tmp_path: Path) -> None:
    task = task_of(tmp_path, *({"prompt": f"{i}+1=", "answer": i + 1} for i in range(40)))
    assert task.texts(3, 40)[:7] == task.texts(3, 7)
    assert task.texts(3, 40) != task.texts(4, 40)
    assert task.score("7+1=", "8") == 1.0


def test_messages_are_chats_and_equal_rows_count_once(tmp_path: Path, tiny_llm: LLM) -> None:
    chat = {"messages": [{"role": "user", "content": "123+456"}], "answer": "0579", "checker": "contains"}
    task = task_of(tmp_path, GOOD, chat, GOOD)
    texts = task.texts(0, 2)
    prompts = dict(zip(texts, task.prompts(tiny_llm, texts), strict=True))
    assert prompts.pop(GOOD["prompt"]) == GOOD["prompt"]
    ((text, prompt),) = prompts.items()
    assert prompt == tiny_llm.engine.intake.chat_prompt(chat["messages"])
    assert task.score(text, "so 0579") == 1.0


@pytest.mark.parametrize(
    ("bad", "options", "problem"),
    [
        ({"prompt": "a"}, {}, r"line 812: answer: is missing"),
        ("{", {}, r"line 812: JSON"),
        ("[1]", {}, r"line 812: JSON: must be an object"),
        ({"answer": "a"}, {}, r"line 812: prompt: give one of"),
        ({"prompt": 5, "answer": "a"}, {}, r"line 812: prompt"),
        ({"prompt": "a", "answer": ["b"]}, {}, r"line 812: answer: must be text or a number"),
        ({"prompt": "a", "answer": "b", "max_tokens": 0}, {}, r"line 812: max_tokens"),
        ({"prompt": "a", "answer": "b", "checker": "exct"}, {}, r"line 812: checker.*did you mean 'exact'"),
        ({"prompt": "a", "answer": "b", "checker": "m:f"}, {}, r"line 812: checker.*--allow-code"),
        ({"prompt": "a", "answer": "b", "checker": "number"}, {}, r"line 812: answer: has no number"),
        ({"prompt": "a", "answer": "(", "checker": "regex"}, {}, r"line 812: answer: is no regular"),
        ({"prompt": "a", "answer": "?", "checker": "multiple_choice"}, {}, r"line 812: answer: names no"),
        ({"prompt": "a", "answer": "12345", "max_tokens": 4}, {}, r"line 812: answer: has 5 tokens"),
        ({"prompt": "a", "answer": "1" * 20}, {"max_tokens": 12}, r"line 812: answer: has 20 tokens"),
        ({"prompt": "0+1=", "answer": "2"}, {}, r"line 812: answer: differs from that of line 1,"),
    ],
)
def test_bad_rows_are_refused_with_their_line(
    tmp_path: Path, bad: Any, options: dict[str, Any], problem: str
) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(811)]
    with pytest.raises(InvalidRequest, match=problem):
        _ = task_of(tmp_path, *rows, bad, **options).canvas_len


def test_files_without_rows_or_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no rows"):
        _ = task_of(tmp_path, "").canvas_len
    with pytest.raises(InvalidRequest, match="cannot be read"):
        _ = FileTask(tmp_path / "none.jsonl", "tiny").canvas_len


CODE = """
import os, time

def by_length(text, row):
    print("not an answer")
    return len(text) == row["length"]

def raises(text, row):
    raise KeyError("no " + text)

def odd(text, row):
    return "yes"

def forgets(text, row):
    time.sleep(60)

def dies(text, row):
    os._exit(3)

def eats(text, row):
    return len(bytearray(16 << 30)) > 0
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "own_checks.py").write_text(CODE)
    return tmp_path


@pytest.mark.slow
def test_code_of_the_users_runs_in_a_process_with_limits(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remask.benchmarks.study.sandbox.CALL_SECONDS", 2.0)
    task = task_of(
        code, {**GOOD, "length": 3, "checker": "own_checks:by_length"}, allow_code=True, max_tokens=8
    )
    assert [task.score(GOOD["prompt"], text) for text in ("abc", "ab")] == [1.0, 0.0]
    for name, problem in (
        ("raises", "KeyError: 'no abc'"),
        ("odd", "returned 'yes'"),
        ("forgets", "longer than 2 seconds"),
        ("dies", "process died"),
        ("eats", "MemoryError"),
        ("missing", "cannot be imported"),
    ):
        sandbox = Sandbox(f"own_checks:{name}", str(code))
        for _ in range(2):  # it can be asked again
            with pytest.raises(CheckFailed, match=problem):
                sandbox("abc", {})
        sandbox.close()


@pytest.mark.slow
def test_a_checker_that_raises_marks_its_sample_and_goes_on(code: Path, tiny_llm: LLM) -> None:
    grid = code / "g.toml"
    grid.write_text(
        """
        [arms]
        plain = { unmask = "threshold" }
        [tasks.own]
        file = "rows.jsonl"
        [[grid]]
        tasks = ["own"]
        arms = ["plain"]
        num_prompts = 2
        block_lengths = ["whole"]
        """
    )
    task_of(code, {**GOOD, "checker": "own_checks:raises"}, {"prompt": "111+222=", "answer": "0333"})
    read = read_grid(grid)
    task = tasks_of(read, grid, allow_code=True)["own"]
    (cell,) = cells(read, {"own": task}, grid)
    rows = []
    for place, text in enumerate(task.texts(0, 2)):
        (output,) = tiny_llm.generate([text], cell.params(place, task.canvas_of(text)), use_tqdm=False)
        rows += rows_of(cell, task, place, text, output, [])
    by_score = {row["score"]: row["error"] for row in rows}
    assert by_score == {1.0: None, None: "checker: KeyError: 'no 0579'"}


def test_code_is_refused_unless_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="--allow-code"):
        checker_of("own_checks:by_length", allow_code=False, import_from=".")
