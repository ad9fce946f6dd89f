"""Model families on Ray: from files and through the object store they write what this process writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from golden_files import GOLDEN

from remask import LLM

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [[7, 9, 11], [13], [5, 6, 7, 8]]
ASKS: list[dict[str, Any]] = [
    {"max_tokens": 12, "unmask": "schedule", "temperature": 1.0, "rank": "top", "seed": 1},
    {"max_tokens": 40, "block_length": 8, "remask": "wino", "temperature": 0.7, "seed": 2},
    {"max_tokens": 20, "remask": "saber", "temperature": 1.0, "seed": 3},
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_rows": 256, "batch_invariant": True}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def samples(checkpoint: str, **options: Any) -> list[Any]:
    with LLM(GOLDEN / checkpoint, **OPTIONS, **options) as llm:
        outputs = llm.generate(PROMPTS, [{**ask, "ignore_eos": True} for ask in ASKS], use_tqdm=False)
    return [(own.token_ids, own.nfe, own.confidences) for output in outputs for own in output.outputs]


@pytest.mark.parametrize(
    ("checkpoint", "load_format"), [("dream-tiny", "auto"), ("lladamoe-tiny", "object_store")]
)
def test_a_family_writes_on_ray_what_it_writes_here(checkpoint: str, load_format: str) -> None:
    on_ray = {"distributed_executor_backend": "ray", "data_parallel_size": 2, "load_format": load_format}
    assert samples(checkpoint, **on_ray) == samples(checkpoint)
