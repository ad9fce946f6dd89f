"""`remask run-batch`: its options and errors, what it prints while it runs, and a process that is stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remask.cli import progress as progress_module
from remask.cli.progress import ProgressDisplay, duration_text, pace_text

Command = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = [sys.executable, "-c", "from remask.cli import main; main()", "run-batch"]


def test_a_file_is_run_and_its_options_are_the_lines_defaults(remask: Command, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "12.4="}\n{"prompt": "1=", "max_tokens": 4, "unmask": "threshold:0.5"}\n')
    options = ("--max-tokens", "6", "--preset", "llada", "--ignore-eos", "--n", "1")
    run = remask("run-batch", "-i", source, "-o", output, *options)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{output}: 2 results; 2 lines in ")
    assert "10 visible tokens" in run.stdout
    first, second = sorted(map(json.loads, output.read_text().splitlines()), key=lambda r: r["custom_id"])
    assert first["response"]["body"]["choices"][0]["nfe"] == 6, "one token a step"
    assert second["response"]["body"]["usage"]["completion_tokens"] == 4


def test_stops_hold_for_lines_that_do_not_say(remask: Command, tmp_path: Path) -> None:
    source, free, stopped = (tmp_path / name for name in ("in.txt", "free.jsonl", "stopped.jsonl"))
    source.write_text("12..34..2.4.43.1=\n")
    common = ("run-batch", "-i", source, "--max-tokens", "20")
    assert remask(*common, "-o", free).returncode == 0
    text = json.loads(free.read_text())["response"]["body"]["choices"][0]["text"]
    assert remask(*common, "-o", stopped, "--stop", text[5:8]).returncode == 0
    (choice,) = json.loads(stopped.read_text())["response"]["body"]["choices"]
    assert (choice["text"], choice["stop_reason"]) == (text[: text.index(text[5:8])], text[5:8])


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("{", (), "in.jsonl: line 2: JSON: cannot be read"),
        (
            '{"prompt": "1="}',
            ("--unmask", "treshold"),
            "in.jsonl: line 1: unmask: unknown policy; did you mean",
        ),
        ('{"prompt": "1="}', ("--invalid-lines", "skip"), "--invalid-lines: must be refuse or record"),
        ('{"prompt": "1="}', ("--model", "/nonexistent"), "model: is not a directory"),
    ],
)
def test_a_users_error_is_told_and_status_2(
    remask: Command, tmp_path: Path, line: str, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "1="}}\n{line}\n')
    run = remask("run-batch", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_stopped_process_is_resumed(
    remask: Command,
    batch_file: Callable[[int], Path],
    tmp_path: Path,
    sent: signal.Signals,
    status: int,
) -> None:
    count = 200  # a second or more
    source, output = batch_file(count), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    arguments = ["-i", source, "-o", output, "--max-num-seqs", "4", "--max-num-rows", "512", "--resume"]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        _, err = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in err
    if sent == signal.SIGINT:
        assert "interrupted; finished lines are saved, --resume continues" in err
    assert not output.exists()
    num_done = partial.read_bytes().count(b"\n")
    assert 0 < num_done < count
    again = remask("run-batch", *arguments)
    assert again.returncode == 0, again.stderr
    assert f"{count} results ({num_done} were done before)" in again.stdout
    assert len({json.loads(line)["custom_id"] for line in output.read_text().splitlines()}) == count
    finished = remask("run-batch", *arguments)
    assert finished.stdout == f"{output} is finished: {count} results\n"


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    with ProgressDisplay() as report:
        report("checking", 1, None)
        now += 11
        report("checking", 3301, None)
        report("running", 500, 20_000)
        for num_done in range(501, 2001):
            now += 0.1
            report("running", num_done, 20_000)
    assert caplog.messages[0] == "checking: 3,301 lines, 300.0 a second"
    assert caplog.messages[1].startswith("running: 60")
    assert "of 20,000 lines, 10.0 a second, 30m" in caplog.messages[-1]
    assert len(caplog.messages) in (1 + 14, 1 + 15)


def test_the_rate_is_that_of_the_last_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    with ProgressDisplay() as report:
        num_done = 0
        report("running", 0, 100_000)
        for second in range(300):
            now += 1
            num_done += 100 if second < 100 else 10
            report("running", num_done, 100_000)
    assert "10.0 a second" in caplog.messages[-1]


def test_times_and_rates_are_readable() -> None:
    assert duration_text(7.2) == "7s"
    assert duration_text(250) == "4m10s"
    assert duration_text(3 * 3600 + 299.6) == "3h05m"
    assert pace_text(12_345, 10, None) == "1,234.5 a second"
    assert pace_text(0, 10, 5) == "0.0 a second"
    assert pace_text(20, 10, 500) == "2.0 a second, 4m10s left"
