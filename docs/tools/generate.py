"""Fills the generated parts of the pages and of the README.

    python docs/tools/generate.py

writes what stands between `<!-- generate: benchmark("throughput") -->` and `<!-- end -->`: the result of the
expression, a function of this folder. The parts are committed, so that pages can be read as Markdown, and a
test compares them. `<!-- build: cli() -->` is filled only when Sphinx reads the page.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import benchmark_facts
import benchmark_pages
import reference
import study_page
from jinja2 import Environment, StrictUndefined
from snippets import pages

PART = re.compile(r"<!-- generate: (.*?) -->\n.*?<!-- end -->", re.DOTALL)
BUILT = re.compile(r"<!-- build: (.*?) -->")
FACTS = {name: value for name, value in vars(benchmark_facts).items() if callable(value)}
STUDY = {name: value for name, value in vars(study_page).items() if name.startswith("study_")}
FUNCTIONS: dict[str, Callable[..., str]] = {
    **FACTS,
    **STUDY,
    "benchmark": benchmark_pages.benchmark,
    "benchmark_index": benchmark_pages.benchmark_index,
    "autoclasses": reference.autoclasses,
    "autopolicies": reference.autopolicies,
    "cli": reference.cli,
    "options": reference.options,
    "parameters": reference.parameters,
    "policy_table": reference.policy_table,
    "preset_table": reference.preset_table,
    "sampling_parameters": reference.sampling_parameters,
}
EXPRESSIONS = Environment(undefined=StrictUndefined, autoescape=False)


def result(expression: str) -> str:
    """The Markdown that an expression stands for; a function that is not known raises an error."""
    return str(EXPRESSIONS.compile_expression(expression, undefined_to_none=False)(**FUNCTIONS))


def filled(text: str) -> str:
    """A page with its committed parts as they should be."""
    return PART.sub(
        lambda found: f"<!-- generate: {found[1]} -->\n\n{result(found[1])}\n\n<!-- end -->", text
    )


def built(text: str) -> str:
    """A page as Sphinx reads it."""
    return BUILT.sub(lambda found: result(found[1]), filled(text))


def main() -> None:
    for path in pages():
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
