"""`Predictor`: batches of a Ray dataset in, the same rows with their texts out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pyarrow as pa

from remask.engine import Engine
from remask.intake import CheckedPrompt
from remask.options import EngineOptions
from remask.outputs import RequestOutput
from remask.scheduler.errors import EngineDead, InvalidRequest, Overloaded, Unavailable
from remask.thread import EngineThread

logger = logging.getLogger(__name__)

PROMPT, MESSAGES, PARAMS, ERROR = "prompt", "messages", "sampling_params", "error"

# The columns that a `Predictor` adds. Those that exist for vLLM in Ray have their names there.
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

Batch = pa.Table | Mapping[str, Any]


class Predictor:
    """A callable class for `Dataset.map_batches` on a pool of actors.

    Rows have the columns `prompt` (text or token ids) or `messages` (a chat), and may have `sampling_params`
    (a struct of the fields of `SamplingParams`; a field that is null counts as absent). All columns stay, and
    `COLUMNS` are added. A row that is refused or fails has the reason in `error` and nulls in the others.

    The engine is the actor's own. Batches that an actor has at the same time share every denoising step. A
    row without a seed gets one of its content, so that it has the same text if Ray runs its batch again;
    equal rows of a batch get different ones. If the engine dies the actor ends, and Ray runs its batches on
    another one.

    Args:
        model: As for `LLM`.
        **engine_kwargs: Options of `EngineOptions`.

    Raises:
        InvalidRequest: An option is invalid.
    """

    def __init__(self, model: str, **engine_kwargs: Any) -> None:
        options = EngineOptions.parse(model=model, **engine_kwargs)
        self._engine = EngineThread(Engine(options))
        self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="remask-batch")

    async def __call__(self, batch: Batch) -> pa.Table:
        """The batch with `COLUMNS`.

        Args:
            batch: a table, or columns of equal lengths.

        Raises:
            InvalidRequest: the batch has no prompts or has one of `COLUMNS`, or its columns differ in length.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self.predict, batch)
        except (EngineDead, Unavailable) as error:
            # Ray restarts an actor whose process ends, and keeps one that raises.
            logger.error("the engine has ended; ending its actor: %s", error)
            logging.shutdown()
            os._exit(1)

    def predict(self, batch: Batch) -> pa.Table:
        """As calling it; blocks."""
        table = as_table(batch)
        check_columns(table.column_names)
        answers: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
        seen: Counter[int] = Counter()
        requests, places = [], {}
        names = [name for name in (PROMPT, MESSAGES, PARAMS) if name in table.column_names]
        for place, row in enumerate(table.select(names).to_pylist()):
            try:
                checked = self._check(row)
            except InvalidRequest as error:
                answers[place] = {ERROR: str(error)}
                continue
            content = _place(checked, 0)
            request = self._engine.intake.request(checked, place=_place(checked, seen[content]))
            seen[content] += 1
            requests.append(request)
            places[request.request_id] = place
        try:
            for output in self._engine.serve(requests):
                answers[places[output.request_id]] = _cells(output)
        except Overloaded as error:
            raise InvalidRequest(
                "batch_size", table.num_rows, f"exceeds the engine's queue: {error}"
            ) from error
        ours = pa.Table.from_pylist(answers, schema=COLUMNS)
        for field, column in zip(COLUMNS, ours.columns, strict=True):
            table = table.append_column(field, column)
        return table

    def _check(self, row: dict[str, Any]) -> CheckedPrompt:
        """A row's request; raises InvalidRequest if it is refused."""
        intake, params = self._engine.intake, _present(row.get(PARAMS) or {})
        prompt, messages = row.get(PROMPT), row.get(MESSAGES)
        if (prompt is None) == (messages is None):
            raise InvalidRequest(PROMPT, prompt, f"give either `{PROMPT}` or `{MESSAGES}`")
        if messages is not None:
            prompt = intake.chat_prompt([_present(message) for message in messages])
        assert prompt is not None, "there are messages"
        checked = intake.check(prompt, params)
        if checked.params.n != 1:
            problem = "a row has one text; use n=1 and repeat the row"
            raise InvalidRequest("n", checked.params.n, problem)
        return checked


def _place(checked: CheckedPrompt, number: int) -> int:
    """What the seed of a row is derived from; `number` is that of the row among equal ones of its batch."""
    content = msgspec.msgpack.encode((checked.ids, repr(checked.params), number))
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _cells(output: RequestOutput) -> dict[str, Any]:
    if output.error is not None:
        return {ERROR: output.error}
    (own,) = output.outputs
    return {
        "generated_text": own.text,
        "generated_tokens": own.token_ids,
        "num_generated_tokens": len(own.token_ids),
        "num_input_tokens": len(output.prompt_token_ids),
        "finish_reason": own.finish_reason,
        "nfe": own.nfe,
        "tokens_per_forward": own.tokens_per_forward,
        "seed": own.seed,
    }


def _present(fields: Any) -> Any:
    """A struct without its nulls: Arrow gives every row all fields that any row has."""
    if not isinstance(fields, Mapping):
        return fields
    return {name: _present(value) for name, value in fields.items() if value is not None}


def as_table(batch: Batch) -> pa.Table:
    """A batch in Arrow's form.

    Raises:
        InvalidRequest: its columns have different lengths.
    """
    if isinstance(batch, pa.Table):
        return batch
    if not isinstance(batch, Mapping):
        raise InvalidRequest("batch_format", type(batch).__name__, "use batch_format='pyarrow' or 'numpy'")
    columns = {name: _column(values) for name, values in batch.items()}
    lens = {name: len(column) for name, column in columns.items()}
    if len(set(lens.values())) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in lens.items())
        raise InvalidRequest("batch", counts, "columns differ in length; give each a value for each row")
    return pa.table(columns)


def _column(values: Any) -> pa.Array:
    return pa.array(values.tolist() if hasattr(values, "tolist") else list(values))


def check_columns(names: list[str]) -> None:
    """Raises InvalidRequest if a dataset with these columns has no prompts, or has a column of ours."""
    if PROMPT not in names and MESSAGES not in names:
        problem = f"is not among the columns {sorted(names)}; add it, or `{MESSAGES}`, in preprocess"
        raise InvalidRequest(PROMPT, None, problem)
    for name in COLUMNS.names:
        if name in names:
            raise InvalidRequest(name, None, "is a column that the engine adds; rename the dataset's")
