"""`Predictor`: batches of a Ray dataset in, the same rows with their texts out.

It knows the columns and that Ray may run a batch again. Pools, resources and stages are the processor's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from remask.engine import Engine
from remask.intake import CheckedPrompt
from remask.openai.bodies import with_defaults
from remask.options import EngineOptions
from remask.outputs import RequestOutput
from remask.scheduler.errors import EngineDead, InvalidRequest, Overloaded, Unavailable
from remask.scheduler.request import Request
from remask.thread import EngineThread

logger = logging.getLogger(__name__)

PROMPT, MESSAGES, PARAMS, ERROR = "prompt", "messages", "sampling_params", "error"

# The columns that a `Predictor` adds. Names follow Ray's processor for vLLM where it has the column.
COLUMNS = pa.schema(
    [
        ("generated_text", pa.string()),
        ("generated_tokens", pa.list_(pa.int64())),
        ("num_generated_tokens", pa.int64()),
        ("num_input_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("nfe", pa.int64()),
        ("tokens_per_forward", pa.float64()),
        ("seed", pa.int64()),
        (ERROR, pa.string()),
    ]
)
MAX_BATCHES = 64  # of an actor at a time
WAIT_SECONDS = 0.05  # between two attempts to enter a full queue

Batch = Any  # a `pa.Table`, or arrays by column
Row = dict[str, Any]


class Predictor:
    """A callable class for `Dataset.map_batches` on a pool of actors.

    Rows have the columns `prompt` (text or token ids) or `messages` (a chat, which comes first), and may have
    `sampling_params` (a struct of the fields of `SamplingParams`; a field that is null counts as absent). All
    columns stay, and `COLUMNS` are added. A row that is refused or fails has the reason in `error` and nulls
    in the other columns.

    The engine is the actor's own. Batches that an actor has at the same time share every denoising step. A
    row without a seed gets one that is derived from all its columns, so that it has the same text if Ray runs
    its batch again; rows of a batch that are equal in all columns get different ones. If the engine dies the
    actor ends, and Ray runs its batches on another one.

    Args:
        model: As for `LLM`.
        sampling_defaults: Parameters of rows that do not set them. None: those of `SamplingParams`.
        **engine_kwargs: Options of `EngineOptions`.

    Raises:
        InvalidRequest: An option is invalid.
    """

    def __init__(
        self, model: str, *, sampling_defaults: Mapping[str, Any] | None = None, **engine_kwargs: Any
    ) -> None:
        self._defaults = sampling_defaults or {}
        self._engine = EngineThread(Engine(EngineOptions.parse(model=model, **engine_kwargs)))
        self._threads = ThreadPoolExecutor(MAX_BATCHES, thread_name_prefix="remask-batch")

    async def __call__(self, batch: Batch) -> Batch:
        """The batch with `COLUMNS`.

        Args:
            batch: A table, to which typed columns are added, or arrays by column.

        Raises:
            InvalidRequest: The batch has no prompts or has one of `COLUMNS`, or its columns differ in length.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self.predict, batch)
        except (EngineDead, Unavailable):
            if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
                raise
            # Ray restarts an actor whose process ends, and keeps one that raises.
            logger.exception("the engine has ended; ending its actor")
            logging.shutdown()
            os._exit(1)

    def predict(self, batch: Batch) -> Batch:
        """Blocking form of calling it."""
        names, rows = _rows(batch)
        check_columns(names)
        answers: list[Row] = [{} for _ in rows]
        places: dict[str, int] = {}
        requests, seen = [], Counter[str]()
        for place, row in enumerate(rows):
            try:
                checked = self._check(row)
            except InvalidRequest as error:
                answers[place] = {ERROR: str(error)}
                continue
            with np.printoptions(threshold=sys.maxsize):  # else long arrays are cut
                content = repr(row)
            requests.append(self._engine.intake.request(checked, place=_seed_key(content, seen[content])))
            places[requests[-1].request_id] = place
            seen[content] += 1
        for output in self._serve(requests):
            answers[places[output.request_id]] = _cells(output)
        return _with_columns(batch, answers)

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()

    def _check(self, row: Row) -> CheckedPrompt:
        """A row's request; raises InvalidRequest if it is refused."""
        intake, params = self._engine.intake, _present(row.get(PARAMS) or {})
        prompt, messages = row.get(PROMPT), row.get(MESSAGES)
        if isinstance(params, dict):
            params.pop("detokenize", None)  # of vLLM: there is always a text
            params = with_defaults(params, self._defaults)
        if messages is not None:
            prompt = intake.chat_prompt(_present(messages))
        if prompt is None:
            raise InvalidRequest(PROMPT, None, f"is null; give it or `{MESSAGES}`")
        checked = intake.check(prompt, params)
        for name, neutral in (("n", 1), ("logprobs", False), ("trace", False)):
            if (value := getattr(checked.params, name)) != neutral:
                problem = "has no column; leave it out" if name != "n" else "has no columns; repeat the row"
                raise InvalidRequest(name, value, problem)
        return checked

    def _serve(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        """The outputs of requests; waits while other batches fill the engine's queue."""
        while True:
            try:
                yield from self._engine.serve(requests)
            except Overloaded:
                time.sleep(WAIT_SECONDS)
            else:
                return


def _seed_key(content: str, number: int) -> int:
    """Hash that the seed of a row is derived from; `number` counts equal rows of its batch."""
    return int.from_bytes(hashlib.blake2b(f"{number}:{content}".encode(), digest_size=8).digest(), "little")


def _cells(output: RequestOutput) -> Row:
    if output.error is not None:
        return {ERROR: output.error}
    (sample,) = output.outputs
    return {
        "generated_text": sample.text,
        "generated_tokens": sample.token_ids,
        "num_generated_tokens": len(sample.token_ids),
        "num_input_tokens": len(output.prompt_token_ids),
        "finish_reason": sample.finish_reason,
        "nfe": sample.nfe,
        "tokens_per_forward": sample.tokens_per_forward,
        "seed": sample.seed,
    }


def _present(value: Any) -> Any:
    """A value as it was before Arrow gave every struct all fields that any has (as nulls), and made all
    numbers of a field floats if one is."""
    if isinstance(value, Mapping):
        return {name: _present(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_present(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _rows(batch: Batch) -> tuple[list[str], list[Row]]:
    """The columns of a batch, and its rows.

    Raises:
        InvalidRequest: it is no batch, or its columns have different lengths.
    """
    if isinstance(batch, pa.Table):
        return batch.column_names, batch.to_pylist()
    if not isinstance(batch, Mapping):
        raise InvalidRequest("batch_format", type(batch).__name__, "use 'pyarrow' or 'numpy'")
    columns = {name: list(values) for name, values in batch.items()}
    lens = {name: len(column) for name, column in columns.items()}
    if len(set(lens.values())) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in lens.items())
        raise InvalidRequest("batch", counts, "columns differ in length; give each a value for each row")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return list(columns), rows


def _with_columns(batch: Batch, answers: Sequence[Row]) -> Batch:
    added = pa.Table.from_pylist(list(answers), schema=COLUMNS)
    if isinstance(batch, pa.Table):
        for field, column in zip(COLUMNS, added.columns, strict=True):
            batch = batch.append_column(field, column)
        return batch
    arrays = {name: np.empty(len(answers), dtype=object) for name in COLUMNS.names}
    for name, array in arrays.items():
        array[:] = added.column(name).to_pylist()
    return {**batch, **arrays}


def check_columns(names: Sequence[str]) -> None:
    """Raises InvalidRequest if a dataset with these columns has no prompts, or has a column of `COLUMNS`."""
    if PROMPT not in names and MESSAGES not in names:
        problem = f"is not among the columns {sorted(names)}; add it, or `{MESSAGES}`, in preprocess"
        raise InvalidRequest(PROMPT, None, problem)
    check_free(names)


def check_free(names: Sequence[str]) -> None:
    """Raises InvalidRequest if a dataset with these columns has a column of `COLUMNS`."""
    for name in COLUMNS.names:
        if name in names:
            raise InvalidRequest(name, None, "is a column that the engine adds; rename the dataset's")
