"""Batch files for the tests of `remask.batch`, and a Ray of one node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from remask import LLM, EngineOptions
from remask.batch.run import BatchOptions, Summary, run_batch

Run = Callable[..., Summary]
MakeFile = Callable[[int], Path]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray  # the fast tier does without

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def run(tiny_llm: LLM) -> Run:
    """`run(source, output, **options)` on the embedded model, loaded once; a forked process loads its own.

    Options of the engine name the run and check its lines; the model that runs them has its own.
    """
    pid = os.getpid()

    def engine() -> AbstractContextManager[LLM]:
        is_forked = os.getpid() != pid
        return LLM("tiny", device="cpu", max_num_rows=4096) if is_forked else nullcontext(tiny_llm)

    def run(source: Path, output: Path, **options: Any) -> Summary:
        own = {name: options.pop(name) for name in EngineOptions.__struct_fields__ if name in options}
        asked = BatchOptions(engine=EngineOptions(model="tiny", **own), **options)
        return run_batch(source, output, engine, asked)

    return run


@pytest.fixture
def batch_file(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a file of so many sampled completions of four tokens, without seeds."""

    def make(count: int) -> Path:
        path = tmp_path / f"{count}.jsonl"
        body = {"max_tokens": 4, "temperature": 1.0, "model": "tiny"}
        lines = [
            {
                "custom_id": f"request {i}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": f"{i % 4 + 1}.{i % 3 + 1}.=", **body},
            }
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return make


@pytest.fixture
def partial_of(run: Run, batch_file: MakeFile, tmp_path: Path) -> Callable[[int], tuple[Path, Path, Path]]:
    """Source, output and partial output of a run that was killed just before it named its output."""

    def make(count: int) -> tuple[Path, Path, Path]:
        source, output = batch_file(count), tmp_path / "out.jsonl"
        run(source, output)
        partial = tmp_path / "out.jsonl.partial"
        output.rename(partial)
        return source, output, partial

    return make
