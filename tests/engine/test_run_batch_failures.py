"""Lines of a batch file that fail: their results, and that `--resume` runs them again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remask.scheduler.messages import StepBatch
from remask.workers.worker import Worker

BAD_SEED = 4711
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception | None]:
    """What bursts with the bad line raise."""
    failure: dict[str, Exception | None] = {"error": ValueError("a kernel raised")}
    launch = Worker._launch

    def broken(self: Worker, batch: StepBatch) -> Any:
        if failure["error"] is not None and any(spec.seed == BAD_SEED for spec in batch.specs):
            raise failure["error"]
        return launch(self, batch)

    monkeypatch.setattr(Worker, "_launch", broken)
    return failure


def write(path: Path) -> Path:
    lines = [{"prompt": f"{i}+1=", "max_tokens": 8, "seed": BAD_SEED if i == 1 else i} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {line["custom_id"]: line["response"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (ValueError("a kernel raised"), 500, "RequestFailed"),
        (torch.OutOfMemoryError("CUDA out of memory"), 413, "RequestTooLarge"),
    ],
    ids=["raises", "too large"],
)
def test_a_line_that_fails_has_its_error_and_is_run_again(
    remask: Command,
    tmp_path: Path,
    error: dict[str, Exception | None],
    raised: Exception,
    status: int,
    kind: str,
) -> None:
    error["error"] = raised
    source, output = write(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ["run-batch", "-i", source, "-o", output, "--device", "cpu", "--max-num-rows", 2048]
    done = remask(*command)
    assert (done.returncode, output.exists()) == (3, False)
    assert "1 of them failed (--resume runs these again)" in done.stdout
    partial = read(tmp_path / "out.jsonl.partial")
    assert len(partial) == 4
    (failed,) = [response for response in partial.values() if response["status_code"] != 200]
    assert failed["status_code"] == status
    assert failed["body"]["error"]["type"] == kind
    assert failed["body"]["error"]["message"]
    again = remask(*command, "--resume")
    assert (again.returncode, output.exists()) == (3, False), "it still fails"
    error["error"] = None
    last = remask(*command, "--resume")
    assert (last.returncode, last.stderr.count("Traceback")) == (0, 0), last.stderr
    results = read(output)
    assert len(results) == len(output.read_text().splitlines()) == 4
    assert all(response["status_code"] == 200 for response in results.values())
    assert not (tmp_path / "out.jsonl.partial").exists()
    kept = [response for response in partial.values() if response["status_code"] == 200]
    assert all(response in results.values() for response in kept), "what was done was not run again"


def test_parquet_holds_only_the_second_run_of_a_line_that_failed(
    remask: Command, tmp_path: Path, error: dict[str, Exception | None]
) -> None:
    import pyarrow.parquet

    source, output = write(tmp_path / "in.jsonl"), tmp_path / "out.parquet"
    command = ["run-batch", "-i", source, "-o", output, "--device", "cpu", "--max-num-rows", 2048]
    assert remask(*command).returncode == 3
    error["error"] = None
    assert remask(*command, "--resume").returncode == 0
    table = pyarrow.parquet.read_table(output)
    assert table["status_code"].to_pylist() == [200] * 4
