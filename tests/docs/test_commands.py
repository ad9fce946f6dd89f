"""Every command and example of a page runs, in the order of the page and in one folder for each page."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from served import running
from snippets import ROOT, Snippet, pages, snippets

from remask import AsyncLLM
from remask.cli import app

RUN = ("bash", "python", "json")
SHELL = ("cat", "curl", "guidellm", "printf", "make", "pip", "pre-commit", "python", "remask", "vllm")
ALL = [snippet for page in pages() for snippet in snippets(page)]
PAGES = {
    path.relative_to(ROOT).as_posix(): [s for s in ALL if s.page == path.relative_to(ROOT).as_posix()]
    for path in pages()
}
RUNNING = {
    page: own
    for page, own in PAGES.items()
    if any(s.language in RUN and not {"no-run", "slow"} & s.options.keys() for s in own)
}

Remask = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the measurement of the knee, on which no example depends."""
    monkeypatch.setattr("remask.workers.startup.knee.SECONDS", 0.1)


class Shell:
    """As much of a shell as the pages use: lines, pipes and `> FILE`. remask runs in this process."""

    def __init__(self, remask: Remask) -> None:
        self._remask = remask

    def run(self, block: str) -> str:
        return "".join(self._line(line) for line in lines(block))

    def _line(self, line: str) -> str:
        words, output = words_of(line), ""
        target = words[words.index(">") + 1] if ">" in words else None
        for command in split(words[: words.index(">")] if target else words, "|"):
            output = self._command(command, output)
        if target is None:
            return output
        Path(target).write_text(output)
        return ""

    def _command(self, words: list[str], stdin: str) -> str:
        if words[0] == "remask":
            done = self._remask(*words[1:], stdin=stdin)
        else:
            done = subprocess.run(words, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout


def lines(block: str) -> list[str]:
    """Its commands, without comments."""
    joined = block.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def words_of(line: str) -> list[str]:
    words = shlex.shlex(line, posix=True, punctuation_chars="|>")
    words.whitespace_split = True
    return list(words)


def split(words: list[str], by: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        parts.append([]) if word == by else parts[-1].append(word)
    return parts


def assert_printed(snippet: Snippet, printed: str) -> None:
    """Asserts that a page's output block matches the printed text."""
    pattern = re.escape(snippet.code.strip()).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), (str(snippet), printed)


@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    remask: Remask,
) -> None:
    monkeypatch.chdir(tmp_path)
    shell, names, printed = Shell(remask), {"__name__": "__main__"}, ""
    for snippet in RUNNING[page]:
        if {"no-run", "slow"} & snippet.options.keys():
            printed = ""
        elif "file" in snippet.options:
            Path(snippet.options["file"]).write_text(snippet.code)
        elif snippet.language == "python":
            exec(compile(snippet.code, str(snippet), "exec"), names)
            printed = capsys.readouterr().out
        elif snippet.language == "bash":
            printed = shell.run(snippet.code)
            assert printed, str(snippet)
        elif snippet.language == "json":
            json.loads(snippet.code)
        elif "output" in snippet.options:
            assert_printed(snippet, printed)


SLOW = {snippet.code: snippet for snippet in ALL if "slow" in snippet.options}.values()
ON_RAY = [snippet for snippet in SLOW if snippet.options["slow"] == "starts-Ray"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet", [pytest.param(s, marks=[pytest.mark.ray] * (s in ON_RAY), id=str(s)) for s in SLOW]
)
def test_a_slow_example_runs(snippet: Snippet, tmp_path: Path) -> None:
    for other in ALL:
        if other.page == snippet.page and "file" in other.options:
            (tmp_path / other.options["file"]).write_text(other.code)
    shell = sys.executable if snippet.language == "python" else "bash"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shell, "-c", snippet.code],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search("0579|report: .*html", done.stdout), "the answer to 123+456=, or a report"


def parse(words: list[str]) -> None:
    """Checks a command's arguments without running it."""
    if words[0] == "remask":
        command: Any = typer.main.get_command(app)
        rest = words[1:]
        while hasattr(command, "commands"):
            command = command.commands[rest[0]]
            rest = rest[1:]
        command.make_context(" ".join(words), list(rest))
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python":
        parse_script(words[1:])
    else:
        assert words[0] in SHELL, words


class _ParsedError(Exception):
    """The arguments of a script were parsed."""


def parse_script(words: list[str]) -> None:
    """Runs a script, `-m MODULE` or a file, up to the parsing of its arguments."""
    is_module = words[0] == "-m"
    target, arguments = (words[1], words[2:]) if is_module else (words[0], words[1:])
    if not arguments:
        assert importlib.util.find_spec(target) if is_module else (ROOT / target).is_file(), target
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse_args(self, *given)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [target, *arguments])
        patch.setattr(sys, "path", list(sys.path))
        run = (
            importlib.import_module(target).main
            if is_module
            else lambda: runpy.run_path(str(ROOT / target), run_name="__main__")
        )
        with pytest.raises(_ParsedError):
            run()


@pytest.mark.parametrize(
    "snippet", [s for s in ALL if "no-run" in s.options and s.language == "bash"], ids=str
)
def test_commands_of_blocks_that_do_not_run_parse(
    snippet: Snippet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in lines(snippet.code):
        for command in split(words_of(line), "|"):
            parse(command)


@pytest.mark.parametrize(
    "snippet", [s for s in ALL if "no-run" in s.options and s.language == "python"], ids=str
)
def test_python_that_does_not_run_compiles_and_imports_what_there_is(snippet: Snippet) -> None:
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree = compile(snippet.code, str(snippet), "exec", flags=flags)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("remask", "ray"):
            for alias in node.names:
                if not hasattr(importlib.import_module(node.module or ""), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language in ("toml", "yaml")], ids=str)
def test_configurations_parse(snippet: Snippet) -> None:
    assert (tomllib.loads if snippet.language == "toml" else yaml.safe_load)(snippet.code)


ANSWERS = ("1234341221434321", "0579")


@pytest.mark.slow
def test_requests_to_a_server_are_answered(remask: Remask) -> None:
    own = [s for s in ALL if s.options.get("no-run") == "needs-a-server" and s.language == "bash"]
    commands = [words_of(line) for snippet in own for line in lines(snippet.code)]
    llm = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    with running(llm) as server:
        for words in commands:
            words = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
            if words[0] == "curl":
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                choice = json.loads(done.stdout)["choices"][0]
                assert choice.get("text", choice.get("message", {}).get("content")) in ANSWERS
            elif words[0] == "remask":
                assert remask(*words[1:]).returncode == 0
    llm.close()
    assert {words[0] for words in commands} == {"curl", "remask", "vllm", "guidellm"}


def test_every_block_that_does_not_run_says_why() -> None:
    for snippet in ALL:
        for word in ("no-run", "slow"):
            assert snippet.options.get(word) != "", str(snippet)


def test_blocks_of_code_name_a_language_that_is_run() -> None:
    known = {*RUN, "text", "toml", "yaml"}
    assert {snippet.language for snippet in ALL} <= known
    assert len([s for s in ALL if s.language in RUN and "no-run" not in s.options]) >= 30
    assert os.environ.get("XDG_CACHE_HOME"), "what runs here leaves nothing in the user's cache"
