"""Another engine as a target. It runs in its own process and Python environment (`peers.protocol`)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remask import InvalidRequest, Unavailable
from remask.benchmarks.serving.targets import Answer, BatchingTarget
from remask.benchmarks.workloads import Job
from remask.scheduler.errors import did_you_mean
from remask.scheduler.params import resolve
from remask.scheduler.policies import Schedule

ADAPTERS = Path(__file__).parent / "peers"
PEERS = ("dlmserve",)
ERROR_CHARACTERS = 500  # length of the shown end of a failed peer's stderr


class PeerTarget(BatchingTarget):
    """Batches of all that wait.

    Args:
        peer: one of `PEERS`, or the path of an adapter of your own.
        python: the interpreter that has the peer.
        model: directory of its checkpoint.
        max_batch: requests of a batch.

    Raises:
        InvalidRequest: there is no such adapter or interpreter.
        Unavailable: the peer does not start.
    """

    def __init__(self, peer: str, python: Path, model: Path, max_batch: int) -> None:
        script = ADAPTERS / f"for_{peer}.py" if peer in PEERS else Path(peer)
        if not script.is_file():
            raise InvalidRequest("peer", peer, f"is no adapter; {did_you_mean(peer, PEERS)}")
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed on leaving
        try:
            self._process = subprocess.Popen(
                [python, script, model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise InvalidRequest("peer_python", str(python), f"cannot be run: {error}") from None
        self.name, self.max_batch = str(self._read("ready")), max_batch
        super().__init__()

    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([_asked(job) for job in jobs]) + "\n")
        self._process.stdin.flush()
        return [Answer(own["text"], own["num_tokens"], own["nfe"]) for own in self._read("answers")]

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self, kind: str) -> Any:
        """The content of the peer's next message."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            stderr = self._errors.read()[-ERROR_CHARACTERS:].strip() or "no message"
            raise Unavailable(f"the peer has ended with status {self._process.returncode}: {stderr}")
        message = json.loads(line)
        if "error" in message:
            raise Unavailable(f"the peer says: {message['error']}")
        return message[kind]


def _asked(job: Job) -> dict[str, Any]:
    unmask = resolve(job.params).unmask
    return {
        "prompt": job.prompt,
        "text": job.text,
        "max_tokens": job.params.max_tokens,
        "block_length": job.params.block_length,
        "steps": unmask.steps if isinstance(unmask, Schedule) else None,
        "seed": job.params.seed,
    }
