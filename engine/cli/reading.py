"""Lines of a text file or of stdin, as the commands read them."""

from __future__ import annotations

import sys
from pathlib import Path

from remask.scheduler.errors import InvalidRequest


def read_lines(file: Path | None, *, option: str) -> list[str]:
    r"""The lines that are not blank. Only "\n" and "\r\n" end one: a prompt may hold U+2028 and its kind.

    Args:
        file: None or "-": stdin; a closed one holds no lines.
        option: what an error calls the file.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    try:
        if file is not None and str(file) != "-":
            content = file.read_bytes()
        else:
            content = b"" if sys.stdin is None else sys.stdin.buffer.read()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(option, str(file), f"cannot be read: {error}") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
