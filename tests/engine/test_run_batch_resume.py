"""Interrupted batch files: `--resume` completes a run after any interruption, with each result once."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remask.batch import journal as journal_module
from remask.batch.check import CustomIds
from remask.batch.identity import parse_id
from remask.batch.journal import BatchStopped, Journal
from remask.batch.run import Summary
from remask.cli import main

Run = Callable[..., Summary]
MakeFile = Callable[[int], Path]
CRASHED = -signal.SIGKILL


def results(path: Path) -> dict[str, Any]:
    """Results by custom_id without their time. Asserts that each is there once."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(path).to_pylist()
    else:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for result in found:
            del result["response"]["body"]["created"]
    by_id = {result["custom_id"]: result for result in found}
    assert len(by_id) == len(found), "a result is there twice"
    return by_id


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Exit status of `work` in a forked process, killed after so many seconds; negative: the signal."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(status)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


def crash_at(count: int) -> None:
    """Kills this process at the count-th call that touches a file; a write is torn in the middle."""
    calls = 0

    def crashing(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def crash_or_call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                if name == "pwrite":
                    file, data, offset = arguments
                    call(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return crash_or_call

    for name in ("open", "pwrite", "fsync", "ftruncate", "link", "unlink", "close"):
        setattr(os, name, crashing(name))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_crash_at_every_call_that_touches_a_file(
    run: Run, batch_file: MakeFile, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(journal_module, "MAX_SYNC_SHARE", 1e9)
    source = batch_file(6)
    run(source, tmp_path / f"undisturbed.{suffix}")
    expected = results(tmp_path / f"undisturbed.{suffix}")
    output = tmp_path / f"out.{suffix}"

    def crashed_run(count: int) -> None:
        crash_at(count)
        run(source, output, resume=True)

    for count in range(1, 200):
        status = in_child(lambda count=count: crashed_run(count))
        if status == 0:
            break
        assert status == CRASHED
        run(source, output, resume=True)
        assert results(output) == expected, f"after a crash at call {count}"
        left = {"out.jsonl", "out.parquet", "undisturbed.jsonl", "undisturbed.parquet", source.name}
        assert set(os.listdir(tmp_path)) <= left
        output.unlink()
    assert count > 20, "the calls were counted"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_kills_at_random_moments(
    run: Run, batch_file: MakeFile, tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command itself, from parsing its arguments to naming its output, killed as by `kill -9`."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow.parquet")
    source = batch_file(60)
    run(source, tmp_path / f"undisturbed.{suffix}")
    expected = results(tmp_path / f"undisturbed.{suffix}")
    output = tmp_path / f"out.{suffix}"
    rng = random.Random(suffix)

    # Few canvases at a time, so that results come one after another. The rows are given, because measuring
    # them takes most of the first run's time, and later runs would end before they are killed.
    arguments = ["-i", str(source), "-o", str(output), "--resume", "--device", "cpu", "--max-num-seqs", "4"]
    arguments += ["--max-num-rows", "512"]

    def command() -> None:
        sys.argv = ["remask", "run-batch", *arguments]
        main()

    started = time.monotonic()
    assert in_child(command) == 0
    whole = time.monotonic() - started
    assert results(output) == expected
    num_kills = num_finished = 0
    sizes = set()
    while num_kills < 8:
        if output.exists():
            assert results(output) == expected
            output.unlink()
            num_finished += 1
        status = in_child(command, kill_after=rng.uniform(0, whole))
        assert status in (CRASHED, 0)
        num_kills += status == CRASHED
        partial = output.with_name(output.name + ".partial")
        sizes.add(partial.stat().st_size if partial.exists() else None)
    assert in_child(command) == 0
    assert results(output) == expected
    assert len(sizes) > 3, "the kills came at different moments"
    capfd.readouterr()


def test_a_resumed_run_writes_what_an_undisturbed_one_writes(
    run: Run, partial_of: Callable[[int], tuple[Path, Path, Path]]
) -> None:
    """Holds at temperature 1 without seeds, for any subset and order of existing results."""
    source, output, partial = partial_of(30)
    lines = partial.read_bytes().splitlines(keepends=True)
    expected = results(partial)
    rng = random.Random(0)
    for _ in range(5):
        partial.write_bytes(b"".join(rng.sample(lines, rng.randrange(30))))
        summary = run(source, output, resume=True)
        assert results(output) == expected
        assert summary.num_lines == 30
        output.unlink()


def test_an_output_torn_at_every_byte_of_its_ends(
    run: Run, partial_of: Callable[[int], tuple[Path, Path, Path]]
) -> None:
    source, output, partial = partial_of(8)
    whole = partial.read_bytes()
    expected = results(partial)
    lines = whole.splitlines(keepends=True)
    found = parse_id(json.loads(lines[0])["id"])
    assert found is not None
    ids = CustomIds()
    for i in range(8):
        ids.append(f"request {i}")
    places = [*range(len(lines[0]) + 1), *range(len(whole) - len(lines[-1]) - len(lines[-2]), len(whole) + 1)]
    for place in places:
        partial.write_bytes(whole[:place])
        num_whole = whole[:place].count(b"\n")
        with Journal(output, resume=True) as journal:
            done = journal.recover(found[0], ids)
            assert done.sum() == num_whole
            assert partial.read_bytes() == b"".join(lines[:num_whole])
            journal.append(lines[num_whole] if num_whole < 8 else b"")
        assert partial.read_bytes() == b"".join(lines[: num_whole + 1])
        if place % 41 == 0 or place == len(whole):
            partial.write_bytes(whole[:place])
            run(source, output, resume=True)
            assert results(output) == expected
            output.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole + b"\0" * 5000,
        lambda whole: whole[:-100] + b"\0" * 100,
        lambda whole: whole[:700] + b"\0" * 1000 + whole[1700:],
        lambda whole: b"\0" * len(whole),
        lambda whole: b"\0" * 300 + whole[300:],
    ],
)
def test_zeros_of_a_power_loss_are_cut_off(
    run: Run, partial_of: Callable[[int], tuple[Path, Path, Path]], damage: Callable[[bytes], bytes]
) -> None:
    source, output, partial = partial_of(8)
    expected = results(partial)
    partial.write_bytes(damage(partial.read_bytes()))
    run(source, output, resume=True)
    assert results(output) == expected


def test_a_full_disk_stops_the_run_and_loses_nothing(run: Run, batch_file: MakeFile, tmp_path: Path) -> None:
    source, output = batch_file(20), tmp_path / "out.jsonl"
    run(source, tmp_path / "undisturbed.jsonl")
    message = tmp_path / "message"

    def limited() -> None:
        limit = 5000  # in the middle of a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(source, output, resume=True)
        except BatchStopped as error:
            message.write_text(str(error))
            sys.exit(3)

    assert in_child(limited) == 3
    assert "results are saved; --resume continues" in message.read_text()
    partial = tmp_path / "out.jsonl.partial"
    assert 4000 < partial.stat().st_size <= 5000
    assert partial.read_bytes().endswith(b"\n"), "rolled back to whole lines"
    assert in_child(limited) == 3, "still full"
    run(source, output, resume=True)
    assert results(output) == results(tmp_path / "undisturbed.jsonl")


def test_a_really_full_file_system(run: Run, batch_file: MakeFile, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(BatchStopped, match=r"No space left on device: [0-9]+ of 40 results are saved"):
            run(batch_file(40), disk / "out.jsonl")
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        summary = run(batch_file(40), disk / "out.jsonl", resume=True)
        assert summary.num_done_before > 0
        assert len(results(disk / "out.jsonl")) == 40
    finally:
        subprocess.run(["umount", disk], check=True)
