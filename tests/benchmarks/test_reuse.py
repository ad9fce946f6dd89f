"""The benchmark of reused keys: what its speeds are taken from."""

from __future__ import annotations

import numpy as np
import pytest
from golden_files import GOLDEN

from remask.benchmarks import reuse
from remask.engine import Engine
from remask.options import EngineOptions
from remask.workers.models.denoiser import TransformerDenoiser


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "CANVAS_LEN", 16)
    monkeypatch.setattr(reuse, "BLOCK_LEN", 8)


@pytest.mark.usefixtures("small")
def test_each_side_decodes_what_its_speed_is_of(golden_model: TransformerDenoiser) -> None:
    prompts = [[5, 6, 7], [8, 9, 10]]
    engine = Engine(EngineOptions(model=str(GOLDEN / "llada-tiny"), device="cpu", max_num_rows=4096))
    load = reuse.Load(2, ("schedule:4",))
    whole = reuse.engine_speed(engine, prompts, reuse.params_of(load, "both"), is_whole=True)
    assert whole.block_forwards == [2] * 4
    first = reuse.engine_speed(engine, prompts, reuse.params_of(load, None), is_whole=False)
    assert set(first.block_forwards) == {2}
    assert 2 <= len(first.block_forwards) <= 4
    assert not engine.has_unfinished()
    engine.close()
    assert reuse.loop_speed(golden_model, prompts, reuse.params_of(load, "both")) > 0


@pytest.mark.usefixtures("small")
def test_the_forwards_of_a_block_end_with_its_last_commit() -> None:
    steps = np.array([1, 2, 2, 1, 3, 3, 1, 1, 4, 4, 4, 5, 5, 8, 8, 4], dtype=np.int32)
    assert reuse.block_forwards(steps) == [3, 5]
    assert reuse.block_forwards(steps[:0]) == []


def test_every_load_has_policies_for_its_requests() -> None:
    for load in reuse.LOADS:
        params = reuse.params_of(load, "both")
        assert len(params) == load.num_requests
        assert [own.reuse for own in params] == ["both"] * load.num_requests
        assert {own.unmask for own in params} == set(load.unmask)
