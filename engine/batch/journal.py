"""The partial output of a run: an interruption loses and repeats no result.

Results are appended to `<output>.partial`, one write for each line, and synchronized to the disk about once a
second. The complete file gets its final name with `link`, which never replaces a file. The partial file
always consists of whole lines and at most one torn line at the end: a killed process tears the last write, a
full disk is rolled back to the last whole line, and after a power loss data that was not synchronized may be
missing or zeros. `recover` keeps the whole lines and truncates the rest, and the run continues with the
missing requests. A lock on the file excludes a second process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remask.batch.check import CustomIds
from remask.batch.identity import RunName, parse_id
from remask.batch.parquet import is_parquet, read_ids
from remask.scheduler.errors import InvalidRequest, RemaskError, shown

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
MAX_SYNC_SHARE = 0.01  # of the run time; a slow disk is synchronized less often
LAST_DONE = 400  # the largest HTTP status of a line that is done
NO_OUTPUT = "is no output of a batch; choose another name"
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


class BatchStopped(RemaskError):
    """The run stopped. Its results are on the disk, and `--resume` continues it."""


class _Response(msgspec.Struct, frozen=True):
    status_code: int


class _Head(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response = _Response(200)

    @property
    def is_done(self) -> bool:
        """Whether the line was answered or refused. A line that failed runs again."""
        return self.response.status_code <= LAST_DONE


class Journal:
    """The partial output of one run, locked while it is open; a context manager.

    Args:
        output: path of the complete output.
        resume: continue an existing partial output. If False, an existing one is an error.

    Attributes:
        finished: whether the output is already complete (only with `resume`).

    Raises:
        InvalidRequest: the output or a partial one exists, another process writes it, or the directory cannot
            be written to.
    """

    def __init__(self, output: Path, *, resume: bool) -> None:
        if not output.name or output.is_dir():
            raise InvalidRequest("--output-file", str(output), "is a directory; give the name of a file")
        self.output, self.partial = output, output.with_name(output.name + ".partial")
        self._converting = output.with_name(output.name + ".converting")
        self._holds_failed = False  # whether the file has failed results beside those of a second run
        self._file = _open_locked(self.partial)
        try:
            self.finished = os.path.lexists(output)
            self._end = os.fstat(self._file).st_size
            if self.finished and not resume:
                raise InvalidRequest(
                    "--output-file", str(output), "exists already; nothing is ever overwritten"
                )
            if self._end and not self.finished and not resume:
                problem = f"an interrupted run left {self.partial.name}; use --resume, or remove it"
                raise InvalidRequest("--output-file", str(output), problem)
            _sync_directory(output.parent)
        except BaseException:
            self.close()
            raise
        self._synced, self._sync_seconds = time.monotonic(), 0.0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlocks the file and removes it if it is empty. Idempotent."""
        if self._file >= 0:
            if os.fstat(self._file).st_size == 0 and _is_same(self.partial, self._file):
                self.partial.unlink()
            os.close(self._file)
            self._file = -1

    def recover(self, run: RunName, ids: CustomIds) -> NDArray[np.bool_]:
        """Returns the results in the file and truncates a torn end.

        Raises:
            InvalidRequest: the file belongs to another run, or has content that no run writes.
        """
        done = np.zeros(len(ids), np.bool_)
        end = 0
        with self.partial.open("rb") as file:
            for line in file:
                head = _read_head(line)
                if head is None:
                    break
                if head.is_done:
                    self._mark(done, run, head, ids)
                else:
                    self._holds_failed = True
                end += len(line)
            else:
                return done
        if end == 0 and not _may_be_torn(line, run):
            raise InvalidRequest("--output-file", str(self.partial), NO_OUTPUT)
        logger.warning("%s: cut off %d bytes of a torn end", self.partial, self._end - end)
        os.ftruncate(self._file, end)
        os.fsync(self._file)
        self._end = end
        return done

    def check_finished(self, run: RunName, num_lines: int) -> None:
        """Raises InvalidRequest unless the output has all results of this run. Removes left-over files."""
        done = np.zeros(num_lines, np.bool_)
        for id, custom_id in _finished_ids(self.output):
            self._mark(done, run, _Head(id, custom_id), None, repeats=is_parquet(self.output))
        if not done.all():
            problem = f"was changed: it holds {done.sum():,} of the {num_lines:,} results of this run"
            raise InvalidRequest("--output-file", str(self.output), problem)
        if self._end:  # killed between the steps of `finish`
            self._converting.unlink(missing_ok=True)
            self.partial.unlink()

    def append(self, line: bytes) -> None:
        """Appends a result atomically.

        Raises:
            BatchStopped: the disk is full or has failed.
        """
        try:
            written = os.pwrite(self._file, line, self._end)
            while written < len(line):  # a nearly full disk writes a part
                written += os.pwrite(self._file, line[written:], self._end + written)
            self._end += len(line)
            pause = max(SYNC_SECONDS, self._sync_seconds / MAX_SYNC_SHARE)
            if time.monotonic() - self._synced > pause:
                self.sync()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise BatchStopped(f"{self.partial}: {error.strerror}") from error

    def sync(self) -> None:
        """Synchronizes the file to the disk."""
        started = time.monotonic()
        os.fsync(self._file)
        self._synced = time.monotonic()
        self._sync_seconds = self._synced - started

    def finish(self, convert: Callable[[Iterable[bytes], Path], None] | None) -> None:
        """Gives the complete output its final name, converted if it is Parquet.

        Raises:
            BatchStopped: the disk is full or has failed, or a file of that name has appeared meanwhile.
        """
        whole = self.partial
        try:
            self.sync()
            if convert is None and self._holds_failed:
                convert = _copy
            if convert is not None:
                whole = self._converting
                with self.partial.open("rb") as journal:
                    convert(filter(_is_done, journal), whole)
                _sync_file(whole)
            _rename_without_replacing(whole, self.output)
            self.partial.unlink(missing_ok=True)
            _sync_directory(self.output.parent)
        except OSError as error:
            if convert is not None:
                whole.unlink(missing_ok=True)
            raise BatchStopped(f"{self.output}: {error.strerror or error}") from error

    def _mark(
        self,
        done: NDArray[np.bool_],
        run: RunName,
        head: _Head,
        ids: CustomIds | None,
        *,
        repeats: bool = False,
    ) -> None:
        found = parse_id(head.id)
        name = str(self.output)
        if found is None:
            raise InvalidRequest("--output-file", name, NO_OUTPUT)
        its_run, index = found
        if its_run != run:
            problem = f"holds results of another run, with {run.difference(its_run)}; choose another file"
            raise InvalidRequest("--output-file", name, problem)
        known = index < len(done) and (ids is None or ids.matches(index, head.custom_id))
        if not known or (done[index] and not repeats):
            problem = f"was changed: the result of {shown(head.custom_id)} is unknown or there twice"
            raise InvalidRequest("--output-file", name, problem)
        done[index] = True


def _open_locked(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InvalidRequest("--output-file", str(path), f"cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InvalidRequest("--output-file", str(path), "is being written by another process") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise InvalidRequest(
                    "--output-file", str(path), f"cannot be locked: {error.strerror}"
                ) from None
            logger.warning("%s: this file system has no locks; do not run two processes on it", path)
        if _is_same(path, file):
            return file
        os.close(file)  # another process finished and renamed it before we locked it


def _is_same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _read_head(line: bytes) -> _Head | None:
    """Id and custom_id of a line; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        return msgspec.json.decode(line, type=_Head)
    except (msgspec.DecodeError, ValueError):
        return None


def _is_done(line: bytes) -> bool:
    head = _read_head(line)
    return head is not None and head.is_done


def _copy(lines: Iterable[bytes], target: Path) -> None:
    with target.open("wb") as file:
        file.writelines(lines)


def _may_be_torn(line: bytes, run: RunName) -> bool:
    """Whether the first line of a file can be a torn first line of this run."""
    head = b'{"id":"' + run.id(0)[:-1].encode()
    start = line[: len(head)].rstrip(b"\0")
    return head.startswith(start)


def _finished_ids(path: Path) -> Iterator[tuple[str, str]]:
    if is_parquet(path):
        yield from read_ids(path)
        return
    try:
        with path.open("rb") as file:
            for line in file:
                head = _read_head(line)
                if head is None:
                    raise InvalidRequest("--output-file", str(path), NO_OUTPUT)
                yield head.id, head.custom_id
    except OSError as error:
        raise InvalidRequest("--output-file", str(path), f"cannot be read: {error.strerror}") from None


def _rename_without_replacing(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(source, target)  # the file system has no links
    else:
        os.unlink(source)


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_directory(path: Path) -> None:
    try:
        _sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES):  # not supported here
            raise
