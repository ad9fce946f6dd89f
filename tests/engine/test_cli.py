"""`remask generate`: where prompts come from, what is printed, how errors look."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from remask import __version__
from remask.benchmarks.tiny.tasks import SUDOKU_6X6

Command = Callable[..., subprocess.CompletedProcess[str]]
PUZZLE = "...543.....2341256..6.3..631.51.5...="


@pytest.mark.slow
def test_it_is_a_process(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "remask", "generate", "1234.=", "--json", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert len(texts(done)) == 1
    refused = subprocess.run([*command, "--unmask", "treshold:0.9"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("remask: error: prompt 0: unmask: unknown policy")


def test_it_says_its_version(remask: Command) -> None:
    done = remask("--version")
    assert (done.returncode, done.stdout) == (0, f"remask {__version__}\n")


def texts(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert run.returncode == 0, run.stderr
    return [json.loads(line)["outputs"][0]["text"] for line in run.stdout.splitlines()]


def test_arguments_a_file_and_stdin_give_the_same(remask: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PUZZLE}\n\n1234.=\n")
    common = ("generate", "--json", "--max-tokens", "12")
    from_arguments = texts(remask(*common, PUZZLE, "1234.="))
    assert len(from_arguments) == 2
    assert texts(remask(*common, "--file", str(file))) == from_arguments
    assert texts(remask(*common, "--file", "-", stdin=file.read_text())) == from_arguments
    assert texts(remask(*common, stdin=file.read_text())) == from_arguments


def test_only_newlines_end_a_prompt_of_a_file(remask: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff1\u20282=\r\n3\x854\x0c5=\n \n".encode())
    for arguments in (("--file", file), ("--file", "-"), ()):
        run = remask("generate", "--json", "--max-tokens", "4", *arguments, stdin=file.read_bytes().decode())
        assert [json.loads(line)["prompt"] for line in run.stdout.split("\n") if line] == [
            "1\u20282=",
            "3\x854\x0c5=",
        ]


def test_a_closed_stdin_holds_no_prompts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from remask.cli import main; main()", "generate", "--max-tokens", "8"]
    run = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True)
    assert (run.returncode, run.stderr.startswith("remask: error: prompts: give prompts")) == (2, True)
    assert len(run.stderr.strip().splitlines()) == 1


def test_the_table_shows_text_and_figures(remask: Command) -> None:
    run = remask("generate", PUZZLE, "--max-tokens", "40", "--block-length", "40", "--unmask", "schedule")
    assert run.returncode == 0, run.stderr
    cells = [line.split("│") for line in run.stdout.splitlines() if line.startswith("│")]
    prompt, text = ("".join(cell[column].strip() for cell in cells) for column in (1, 2))
    assert prompt == PUZZLE, "long texts are folded, not cut"
    assert SUDOKU_6X6.is_correct(PUZZLE, text)
    for expected in ("NFE", "tokens/forward", "seconds", "40", "0.90", "1 sample in", "36 visible tokens"):
        assert expected in run.stdout


def test_stops_end_the_text(remask: Command) -> None:
    common = ("generate", "--json", "--max-tokens", "40", PUZZLE)
    (whole,) = texts(remask(*common))
    assert texts(remask(*common, "--stop", "nowhere", "--stop", whole[4:7])) == [
        whole[: whole.index(whole[4:7])]
    ]
    including = remask(*common, "--stop", whole[4:7], "--include-stop-str-in-output")
    assert texts(including) == [whole[: whole.index(whole[4:7]) + 3]]
    line = json.loads(remask(*common).stdout)["outputs"][0]
    by_id = remask(*common, "--stop-token-id", str(line["token_ids"][2]))
    assert texts(by_id) == [whole[: whole.index(whole[2])]]


def test_a_preset_gives_way_to_options(remask: Command) -> None:
    run = remask("generate", PUZZLE, "--json", "--preset", "llada", "--max-tokens", "40", "--chat")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["outputs"][0]["nfe"] == 40
    faster = remask(
        "generate", PUZZLE, "--json", "--preset", "llada", "--max-tokens", "40", "--unmask", "threshold:0.5"
    )
    assert json.loads(faster.stdout)["outputs"][0]["nfe"] < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--unmask", "treshold:0.9", "x"), "remask: error: prompt 0: unmask: unknown policy; did you mean"),
        (("--max-tokens", "0", "x"), "remask: error: prompt 0: max_tokens"),
        (("--preset", "wini", "x"), "did you mean 'wino'"),
        (("--model", "/nonexistent", "x"), "remask: error: model: is not a directory"),
        (("--attention-backend", "flash", "x"), "remask: error: attention_backend"),
        (("--quantization", "fp8", "--dtype", "float32", "x"), "remask: error: quantization"),
        (("--file", "/nonexistent"), "remask: error: --file: cannot be read"),
        (("--file", "/nonexistent", "x"), "exclude each other"),
        ((), "remask: error: prompts: give prompts"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    remask: Command, arguments: tuple[str, ...], message: str
) -> None:
    run = remask("generate", *arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
