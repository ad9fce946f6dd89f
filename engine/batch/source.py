"""The input of a batch: JSON lines, text or Parquet, read one line at a time.

A run reads the file twice, to check and to run its lines, and a resumed run reads it again. The file must not
change: a line is yielded only while size, time and inode are those of the first access.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from remask.batch.parquet import read_rows, require_pyarrow
from remask.scheduler.errors import InvalidRequest

MAX_LINE_BYTES = 64 * 2**20  # a longer line means that the file has another format
BOM = b"\xef\xbb\xbf"


class Text(NamedTuple):
    """A line of a text file, which is a prompt."""

    line: bytes


Content = bytes | Text | dict[str, Any]  # of a line: JSON, text, or a Parquet row


class Source:
    """An input file. `.txt` has a prompt a line, `.parquet` a request a row, any other suffix means JSON
    lines.

    Raises:
        InvalidRequest: the file does not exist, is not regular, or is Parquet and pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        suffix = path.suffix.lower()
        self._is_text, self._is_parquet = suffix == ".txt", suffix == ".parquet"
        self.unit = "row" if self._is_parquet else "line"
        try:
            self._signature = self._current_signature()
            with path.open("rb"):
                pass
        except OSError as error:
            raise InvalidRequest("--input-file", str(path), f"cannot be read: {error.strerror}") from None
        if self._is_parquet:
            require_pyarrow("--input-file", path)

    def digest(self) -> str:
        """Hex digest of the file's bytes."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        self._check_unchanged()
        return digest

    def __iter__(self) -> Iterator[tuple[int, Content]]:
        """Number (from 1) and content of every line that is not blank.

        Raises:
            InvalidRequest: the file was changed, or has a line longer than MAX_LINE_BYTES.
        """
        lines: Iterator[tuple[int, Content]] = (
            read_rows(self.path) if self._is_parquet else self._read_lines()  # type: ignore[assignment]
        )
        for number, content in lines:
            self._check_unchanged()
            yield number, content
        self._check_unchanged()

    def _read_lines(self) -> Iterator[tuple[int, bytes | Text]]:
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    problem = f"line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB"
                    raise InvalidRequest("--input-file", str(self.path), problem)
                if number == 1:
                    line = line.removeprefix(BOM)
                if not line.strip():
                    continue
                yield number, Text(line) if self._is_text else line

    def _current_signature(self) -> tuple[int, int, int]:
        info = os.stat(self.path)
        if not stat.S_ISREG(info.st_mode):
            raise InvalidRequest("--input-file", str(self.path), "must be a file: it is read more than once")
        return info.st_size, info.st_mtime_ns, info.st_ino

    def _check_unchanged(self) -> None:
        if self._current_signature() != self._signature:
            raise InvalidRequest("--input-file", str(self.path), "was changed while it was being read")


def decode(content: Content) -> dict[str, Any]:
    """The fields of a line; text is a prompt.

    Raises:
        InvalidRequest: the line is not UTF-8, or not a JSON object.
    """
    if isinstance(content, Text):
        try:
            return {"prompt": content.line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise InvalidRequest("prompt", content.line, f"is not UTF-8: {error.reason}") from None
    if isinstance(content, dict):
        return content
    try:
        fields = msgspec.json.decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        shown = content.strip().decode(errors="replace")
        raise InvalidRequest("JSON", shown, f"cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("JSON", fields, "must be an object")
    return fields
