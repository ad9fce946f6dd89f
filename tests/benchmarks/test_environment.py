"""The stamp that measurements carry."""

from __future__ import annotations

import pytest

from remask.benchmarks.environment import environment_stamp


def test_a_copy_of_a_checkout_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMASK_COMMIT", "0123456789ab")
    assert environment_stamp()["commit"] == "0123456789ab"
    monkeypatch.delenv("REMASK_COMMIT")
    assert environment_stamp()["commit"] != "0123456789ab"
