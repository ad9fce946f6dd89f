"""What HTML reports share: a style, and pictures that are part of the page."""

from __future__ import annotations

import base64
import html
from pathlib import Path

STYLE = """
body { font-family: sans-serif; max-width: 75em; margin: 2em auto; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .3em .7em; border: 1px solid #ccc }
td { text-align: right } td:first-child, th { text-align: left } img { max-width: 100% }
small { color: #666 }
"""


def picture(path: Path, text: str) -> str:
    """A PNG file as HTML that holds it; `text` is shown without pictures."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{content}">'
