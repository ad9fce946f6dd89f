"""One run of a batch file: checks all lines, finds the results that exist, runs the rest, names the output.

Memory grows by 17 bytes for each line: about `max_live` samples are in the engine at a time, and each result
is written when it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from remask.batch.check import Report, check_lines
from remask.batch.identity import RunName, model_digest, parameters_digest
from remask.batch.journal import BatchStopped, Journal
from remask.batch.lines import Line, LineReader
from remask.batch.parquet import is_parquet, require_pyarrow, write_rows
from remask.batch.source import Source
from remask.checkpoint import intake_of
from remask.openai.responses import (
    ID_PREFIXES,
    Completion,
    ScoreResponse,
    completion,
    error_body,
    failure_body,
    score_response,
)
from remask.options import EngineOptions
from remask.outputs import RequestOutput
from remask.scheduler.policies.presets import is_file, preset_fields
from remask.scheduler.request import Request
from remask.scoring import CheckedScore

if TYPE_CHECKING:
    from remask.llm import LLM

OK, REFUSED = 200, 400  # HTTP
DECISIVE = ("dtype", "quantization", "batch_invariant", "seed")  # engine options that determine results


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a run beside its files. The first three determine the results and identify the run."""

    engine: EngineOptions  # `seed` and the index of a line give the default seed of the line
    defaults: Mapping[str, Any] = {}  # default parameters of a line
    chat: bool = False  # text prompts go through the chat template
    model_names: Sequence[str] = ()  # further names of the model; results have the first
    resume: bool = False
    record_invalid: bool = False  # invalid lines become results instead of an error
    max_live: int = 2048  # samples in the engine from which on no further line is read

    @property
    def every_name(self) -> tuple[str, ...]:
        """What a line may call the model; the first is its name in results."""
        return tuple(dict.fromkeys((*self.model_names, *self.engine.model_names)))


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a run.

    Attributes:
        num_lines: requests of the input.
        num_done_before: results of earlier runs.
        num_refused: results of this run that belong to invalid lines.
        num_failed: lines that failed in this run. They are not done, and the output is not complete.
        num_tokens, num_forwards, seconds: tokens, forwards and seconds of this run, without the check.
    """

    num_lines: int
    num_done_before: int
    num_refused: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_forwards: int = 0
    seconds: float = 0.0


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: Completion[Any] | ScoreResponse | dict[str, Any]


class _Result(msgspec.Struct, frozen=True):
    id: str  # first field, so that the start of a file identifies its run
    custom_id: str
    response: _Response
    error: None = None


def run_batch(
    source: Path,
    output: Path,
    make_llm: Callable[[], AbstractContextManager[LLM]],
    options: BatchOptions,
    report: Report = lambda *_: None,
) -> Summary:
    """Runs the requests of a file, or those that an interrupted run has not done.

    Args:
        source: the input file.
        output: path of the complete output; until then it is `<output>.partial`.
        make_llm: loads the model; called after the file has been checked.
        options: options of the run.
        report: called with the progress after every line.

    Raises:
        InvalidRequest: a file or an option is invalid. Nothing was run.
        InvalidBatch: lines are invalid. Nothing was run.
        BatchStopped: the disk is full or has failed. Results so far are on the disk.
    """
    lines = Source(source)
    if is_parquet(output):
        require_pyarrow("--output-file", output)
    with Journal(output, resume=options.resume) as journal:
        run = RunName(
            lines.digest()[:8],
            model_digest(options.engine.model),
            parameters_digest(
                {
                    **{name: getattr(options.engine, name) for name in DECISIVE},
                    "defaults": options.defaults,
                    "chat": options.chat,
                    **_file_preset(options.defaults),
                }
            ),
        )
        if journal.finished:
            num_lines = sum(1 for _ in lines)
            journal.check_finished(run, num_lines)
            return Summary(num_lines=num_lines, num_done_before=num_lines)
        reader = LineReader(
            intake_of(options.engine),
            unit=lines.unit,
            model_names=options.every_name,
            defaults=options.defaults,
            chat=options.chat,
        )
        ids = check_lines(lines, reader, record_invalid=options.record_invalid, report=report)
        done = journal.recover(run, ids)
        with make_llm() as llm:
            return _Run(lines, reader, journal, run, llm, options, report).work(done)


def _file_preset(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of a preset says, which may change between two runs."""
    preset = defaults.get("preset")
    return {"preset": preset_fields(preset)} if is_file(preset) else {}


class _Run:
    """The second pass: submits requests and writes results."""

    def __init__(
        self,
        source: Source,
        reader: LineReader,
        journal: Journal,
        run: RunName,
        llm: LLM,
        options: BatchOptions,
        report: Report,
    ) -> None:
        self._source, self._reader, self._journal, self._run = source, reader, journal, run
        self._engine, self._options, self._report = llm.engine, options, report
        self._model_name = options.every_name[0]
        self._encoder = msgspec.json.Encoder()
        self._live: dict[str, tuple[int, Line]] = {}  # request id -> index and line
        self._num_refused = self._num_failed = self._num_tokens = self._num_forwards = 0

    def work(self, done: NDArray[np.bool_]) -> Summary:
        """Runs the lines that are not done."""
        num_before = self._num_done = int(done.sum())
        self._num_lines = len(done)
        self._report("running", self._num_done, self._num_lines)
        started = time.monotonic()
        try:
            for output in self._engine.serve(self._requests(done), max_live=self._options.max_live):
                index, line = self._live.pop(output.request_id)
                self._write_output(index, line, output)
            if self._num_failed:
                self._journal.sync()
            else:
                self._journal.finish(write_rows if is_parquet(self._journal.output) else None)
        except BatchStopped as error:
            safe = f"{self._num_done:,} of {self._num_lines:,} results are saved; --resume continues"
            raise BatchStopped(f"{error}: {safe}") from error
        return Summary(
            num_lines=self._num_lines,
            num_done_before=num_before,
            num_refused=self._num_refused,
            num_failed=self._num_failed,
            num_tokens=self._num_tokens,
            num_forwards=self._num_forwards,
            seconds=time.monotonic() - started,
        )

    def _requests(self, done: NDArray[np.bool_]) -> Iterator[Request]:
        """The requests that are not done. Invalid ones become results at once."""
        for index, (number, content) in enumerate(self._source):
            if done[index]:
                continue
            line = self._reader.read(number, content)
            if line.checked is None:
                assert line.fault is not None, "a line has a request or a fault"
                self._num_refused += 1
                self._write(index, line, REFUSED, error_body(line.fault))
                continue
            if isinstance(line.checked, CheckedScore):
                request = line.checked.request(self._engine.intake)
            else:
                request = self._engine.intake.request(line.checked, place=index)
                line = line._replace(checked=None)  # only scores are read from it
            self._live[request.request_id] = (index, line)
            yield request

    def _write_output(self, index: int, line: Line, output: RequestOutput) -> None:
        if line.kind != "score":
            self._num_tokens += sum(sample.num_visible_tokens for sample in output.outputs)
        self._num_forwards += sum(sample.nfe for sample in output.outputs)
        if output.error_status is not None:
            self._num_failed += 1
            self._write(index, line, output.error_status, failure_body(output))
            return
        about = {
            "id": f"{ID_PREFIXES[line.kind]}-{''.join(self._run)}-{index}",
            "created": int(time.time()),
            "model": self._model_name,
        }
        if isinstance(line.checked, CheckedScore):
            body = score_response(line.checked, output, **about)
        else:
            assert line.kind != "score", "a score was checked as one"
            tokenizer = self._engine.tokenizer
            body = completion(line.kind, [output], tokenizer, echo=line.echo, **about)
        self._write(index, line, OK, body)

    def _write(
        self, index: int, line: Line, status: int, body: Completion[Any] | ScoreResponse | dict[str, Any]
    ) -> None:
        response = _Response(status, f"{''.join(self._run)}-{index}", body)
        result = _Result(self._run.id(index), line.custom_id, response)
        self._journal.append(self._encoder.encode(result) + b"\n")
        self._num_done += 1
        self._report("running", self._num_done, self._num_lines)
