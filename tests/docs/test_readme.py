"""The README is short and leads to everything else."""

from __future__ import annotations

import re

import reference
from snippets import ROOT

README = (ROOT / "README.md").read_text()


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


def test_every_file_that_the_readme_links_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_names_policies_that_exist() -> None:
    named = set(re.findall(r"\(docs/policies/(\w+)\.md\)", README)) - {"index", "custom"}
    assert len(named) > 10
    assert named <= set(reference.own_policies())
