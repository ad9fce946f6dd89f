"""Ray in the fast tier: one engine with one worker. What else runs on Ray is tested in the slow tier."""

from __future__ import annotations

import pytest

from remask import LLM

PROMPTS = ["123+456=", "111+222=", "12..34..2.4.43.1="]


@pytest.mark.ray
def test_a_worker_on_ray_writes_what_this_process_writes(tiny_llm: LLM) -> None:
    with LLM("tiny", device="cpu", distributed_executor_backend="ray", max_num_rows=512) as llm:
        found, expected = (engine.generate(PROMPTS, {"max_tokens": 16}) for engine in (llm, tiny_llm))
    assert [output.outputs[0].token_ids for output in found] == [o.outputs[0].token_ids for o in expected]
