"""Sphinx reads this: the pages are Markdown (MyST), the reference comes from docstrings.

`tools/generate.py` fills in what is generated, so that tables, figures, policies and commands are those of
the package and of the committed measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tools"))

import generate  # noqa: E402

import remask  # noqa: E402

project, author = "remask", "The remask authors"
version = release = remask.__version__
html_title = f"remask {release}"
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["_build", "tools"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say what arguments are
autodoc_member_order = "bysource"
napoleon_use_ivar = True
default_role = "literal"
# Nothing links to the types of Python, NumPy, PyTorch, msgspec and Ray, nor to classes that have no page.
nitpick_ignore_regex = [("py:.*", r"(?!remask\.[A-Z]).*")]


def fill(app: Any, name: str, source: list[str]) -> None:
    source[0] = generate.built(source[0])


def setup(app: Any) -> None:
    app.connect("source-read", fill)
