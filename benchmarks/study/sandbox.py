"""A function of the user's in a process of its own, with limits.

The process may use `MEMORY_BYTES` of address space and write files of at most `FILE_BYTES`, works in an empty
folder that is removed, and is killed if a call takes longer than `CALL_SECONDS`. It is the user's, with the
user's rights: the limits protect against accidents, such as a program that a model wrote and that never ends,
and not against an attacker.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

CALL_SECONDS = 10.0
START_SECONDS = 60.0  # to import the module
MEMORY_BYTES = 4 << 30
FILE_BYTES = 64 << 20
MAX_ANSWER_BYTES = 1 << 20
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")


class CheckFailed(Exception):
    """A text could not be judged."""


class Sandbox:
    """A checker that calls `module:function` as `function(text, row)`; it returns a bool or a number from 0
    to 1. The process starts with the first call, and again after a call that took too long.

    Args:
        name: `module:function`.
        import_from: folder in which the module is looked for besides the installed packages.
    """

    def __init__(self, name: str, import_from: str) -> None:
        self._name, self._import_from = name, str(Path(import_from).resolve())
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, text: str, row: dict[str, Any]) -> float:
        process = self._process or self._start()
        answer = self._ask(process, {"text": text, "row": row}, CALL_SECONDS)
        if "error" in answer:
            raise CheckFailed(answer["error"])
        score = answer["score"]
        if isinstance(score, bool | int | float) and 0 <= score <= 1:
            return float(score)
        raise CheckFailed(f"the checker returned {score!r}; it must return a bool or a number from 0 to 1")

    def close(self) -> None:
        """Ends the process; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._folder = tempfile.TemporaryDirectory(prefix="remask-checker-")
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._name, self._import_from],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={**kept, "HOME": self._folder.name},
            start_new_session=True,
        )
        self._process = process
        weakref.finalize(self, _kill, process)
        answer = self._ask(process, None, START_SECONDS)
        if "error" in answer:
            self.close()
            raise CheckFailed(answer["error"])
        return process

    def _ask(self, process: subprocess.Popen[bytes], question: Any, seconds: float) -> dict[str, Any]:
        """Writes a question, unless it is None, and reads the answer."""
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        try:
            if question is not None:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
            line = _read_line(process.stdout.fileno(), seconds)
        except TimeoutError:
            self.close()
            raise CheckFailed(f"the checker took longer than {seconds:.0f} seconds") from None
        except (OSError, EOFError):
            self.close()
            raise CheckFailed("the checker's process died") from None
        return json.loads(line)


def _read_line(file: int, seconds: float) -> bytes:
    """A line from a pipe that has one writer, which writes a line at a time.

    Raises:
        TimeoutError: it does not come in time.
        EOFError: the writer has ended.
    """
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([file], [], [], seconds)[0]:
            raise TimeoutError
        part = os.read(file, 1 << 16)
        if not part or len(line) > MAX_ANSWER_BYTES:
            raise EOFError
        line += part
    return line


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def main() -> None:
    """The process: imports the function, says so, and answers questions until its input ends."""
    name, import_from = sys.argv[1:]
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the function prints is no answer
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))

    def answer(content: dict[str, Any]) -> None:
        output.write(json.dumps(content).encode() + b"\n")
        output.flush()

    try:
        sys.path.insert(0, import_from)
        module, _, function = name.partition(":")
        checker: Any = importlib.import_module(module)
        for part in function.split("."):
            checker = getattr(checker, part)
    except BaseException as error:
        answer({"error": f"{name} cannot be imported: {error!r}"})
        return
    answer({})
    for line in sys.stdin.buffer:
        question = json.loads(line)
        try:
            score = checker(question["text"], question["row"])
            json.dumps(score)
        except BaseException as error:
            answer({"error": f"{type(error).__name__}: {error}"[:MAX_ANSWER_BYTES]})
        else:
            answer({"score": score})


if __name__ == "__main__":
    main()
