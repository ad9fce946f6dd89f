"""The fenced blocks of the pages, and what their info strings say.

A block of `bash`, `python` or `json` runs in a test. Words behind the language change that:

- `no-run=REASON`: it is not run; its commands are still checked to parse.
- `slow=REASON`: it runs by itself, in a process of its own.
- `file=NAME`: it is written to that file, for the page's later blocks.
- `output` (of `text`): what the block before prints; `...` stands for anything.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    language: str
    options: dict[str, str]
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """All pages that readers see, the README first."""
    own = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *own]


def snippets(path: Path) -> Iterator[Snippet]:
    """The fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        words = [word.partition("=") for word in found[3].split()]
        yield Snippet(
            page=str(path.relative_to(ROOT)),
            line=text.count("\n", 0, found.start()) + 1,
            language=found[2],
            options={key: value for key, _, value in words},
            code=textwrap.dedent(found[4]),
        )
