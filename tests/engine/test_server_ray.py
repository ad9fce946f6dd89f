"""A server on Ray: a worker that dies breaks no stream and changes no text."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from served import joined, running

from remask import LLM, AsyncLLM
from remask.workers.executors.ray_executor import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STREAMS = 64
PROMPTS = ["123+456=", "111+222=", "12..34..2.4.43.1=", "999+1="]
ASKS: list[dict[str, Any]] = [
    {"max_tokens": 32, "block_length": 8, "unmask": "schedule", "temperature": 1.0},
    {
        "max_tokens": 32,
        "block_length": 8,
        "unmask": "capped_threshold:0.6",
        "remask": "wino",
        "temperature": 0.7,
    },
]


def test_a_worker_that_dies_breaks_no_stream() -> None:
    bodies = [
        {"prompt": PROMPTS[i % 4], "ignore_eos": True, **ASKS[i % 2], "seed": i} for i in range(NUM_STREAMS)
    ]
    params = [{name: value for name, value in body.items() if name != "prompt"} for body in bodies]
    options: dict[str, Any] = {"device": "cpu", "max_num_rows": 512, "batch_invariant": True, "burst": 2}
    with LLM("tiny", **options) as alone:
        outputs = alone.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        llm = AsyncLLM("tiny", distributed_executor_backend="ray", data_parallel_size=2, **options)
        executor = llm.engine._engine.executor
        assert isinstance(executor, RayExecutor)
        first = executor._pool.held[executor.workers[0]].actor
        pid = ray.get(first.__ray_call__.remote(lambda _: os.getpid()))
        with running(llm) as server, ThreadPoolExecutor(NUM_STREAMS) as pool:
            streams = [pool.submit(server.events, **body) for body in bodies]
            while server.served.engine.num_live < NUM_STREAMS:
                time.sleep(0.01)
            time.sleep(0.5)  # bursts run
            os.kill(pid, signal.SIGKILL)
            found = [stream.result() for stream in streams]
            assert server.client.get("/health").status_code == 200
        llm.close()
    finally:
        ray.shutdown()
    assert all("error" not in event for events in found for event in events)
    assert [joined(events)[0] for events in found] == expected
