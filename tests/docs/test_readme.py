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


def test_the_readme_counts_the_policies_and_lists_them_all() -> None:
    policies = reference.own_policies()
    assert f"**Policies** {len(policies)}," in README
    assert all(f"(docs/policies/{name}.md)" in README for name in policies)
