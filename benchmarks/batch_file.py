"""A batch file of 20,000 lines: is memory flat, and does it run as fast as `LLM.generate`?

    python -m remask.benchmarks.batch_file --output benchmarks/results/batch_file.json

Two processes serve the same requests, one thread each: `run_batch` on a file of OpenAI batch lines (its time
includes digest, checking and writing results to disk), and one call of `LLM.generate` with all prompts. The
processes take turns of a few seconds, and the other one is stopped meanwhile, so that other load on the
machine slows down both. Only a process's own turns are timed. Memory is the resident set of the batch
process, sampled once a second during its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remask import LLM, EngineOptions
from remask.batch.run import BatchOptions, run_batch
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.tiny.tasks import SUDOKU_6X6

PARAMS = {"max_tokens": 40, "block_length": 40, "unmask": "threshold:0.9"}
READY, DONE = b"R", b"D"
SAMPLE_SECONDS = 1.0


def write_batch_file(path: Path, count: int) -> None:
    """Lines of OpenAI's batch format: half-empty 6x6 sudokus."""
    prompts, _ = SUDOKU_6X6.held_out(np.random.default_rng(0), count)
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            line = {
                "custom_id": f"puzzle-{i}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "tiny", "prompt": prompt, **PARAMS},
            }
            file.write(json.dumps(line) + "\n")


def contend(name: str, source: Path, output: Path) -> None:
    """Runs a contender in this process. Writes READY when it can be started, and DONE at the end."""
    torch.set_num_threads(1)
    with LLM("tiny", device="cpu") as llm:
        llm.generate("12.4=", {"max_tokens": 4}, use_tqdm=False)
        prompts = []
        if name == "generate":
            prompts = [json.loads(line)["body"]["prompt"] for line in source.read_text().splitlines()]
        os.write(1, READY)
        if name == "generate":
            llm.generate(prompts, dict(PARAMS), use_tqdm=False)
        else:
            run_batch(
                source, output, lambda: nullcontext(llm), BatchOptions(engine=EngineOptions(model="tiny"))
            )
        os.write(1, DONE)


class Contender:
    """A process that is stopped except in its turns."""

    def __init__(self, name: str, source: Path, output: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "remask.benchmarks.batch_file",
            "--contend",
            name,
            str(source),
            str(output),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.seconds = 0.0  # of its own turns
        self.rss: list[tuple[float, float]] = []  # seconds of its turns, MB
        assert self._process.stdout is not None, "asked for above"
        self._pipe = self._process.stdout.fileno()
        if os.read(self._pipe, 1) != READY:
            raise RuntimeError(f"{name} did not start")
        os.kill(self._process.pid, signal.SIGSTOP)

    def turn(self, seconds: float) -> bool:
        """Lets the process run for one turn. Returns whether it has finished."""
        os.kill(self._process.pid, signal.SIGCONT)
        started = time.monotonic()
        done = False
        while not done and (left := started + seconds - time.monotonic()) > 0:
            done = bool(select.select([self._pipe], [], [], min(left, SAMPLE_SECONDS))[0])
            if not done:
                self.rss.append((self.seconds + time.monotonic() - started, self._resident_mb()))
        if not done:
            os.kill(self._process.pid, signal.SIGSTOP)
        self.seconds += time.monotonic() - started
        if done and os.read(self._pipe, 1) != DONE:
            raise RuntimeError("a contender failed")
        return done

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _resident_mb(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1000


def measure(count: int, turn_seconds: float) -> dict[str, Any]:
    """Both contenders in turns; seconds of each, and the batch's memory over its seconds."""
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        write_batch_file(source, count)
        contenders = {name: Contender(name, source, output) for name in ("batch", "generate")}
        try:
            running = dict(contenders)
            while running:
                for name in list(running):
                    if running[name].turn(turn_seconds):
                        del running[name]
        finally:
            for contender in contenders.values():
                contender.close()
        num_results = len({json.loads(line)["custom_id"] for line in output.read_text().splitlines()})
    seconds = {name: round(contender.seconds, 1) for name, contender in contenders.items()}
    rss = contenders["batch"].rss
    late = [megabytes for at, megabytes in rss if at >= 60]
    return {
        "lines": count,
        "results": num_results,
        "turn_seconds": turn_seconds,
        "seconds": seconds,
        "lines_per_second": {name: round(count / value, 1) for name, value in seconds.items()},
        "rate_of_batch_to_generate": round(seconds["generate"] / seconds["batch"], 4),
        "rss_mb_after_first_minute": {"min": min(late), "max": max(late)} if late else None,
        "rss_mb_every_second": [[round(at, 1), round(megabytes, 1)] for at, megabytes in rss],
        "rss_mb_of_generate_at_end": contenders["generate"].rss[-1][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--turn-seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--contend", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.contend:
        name, source, output = args.contend
        contend(name, Path(source), Path(output))
        return
    report = {"environment": environment_stamp(), **measure(args.lines, args.turn_seconds)}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    del report["rss_mb_every_second"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
