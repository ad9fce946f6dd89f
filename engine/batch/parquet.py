"""Reads and writes Parquet by record batches. Imports pyarrow when it is first needed.

A row of the input is a plain line with the columns as fields. Null means "not given", also inside structs,
where Parquet has every field of every row. The output has a row for each sample. It is converted from the
complete journal, because an interrupted Parquet file cannot be continued.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from remask.scheduler.errors import InvalidRequest

TOKEN_COLUMNS = {"tokens": "token", "token_logprobs": "logprob"}  # and their names in a chat
ROWS = 1024  # rows in memory at a time
SAME = (
    "finish_reason",
    "completion_tokens",
    "nfe",
    "tokens_per_forward",
    "seed",
)  # columns and fields of a choice


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def require_pyarrow(option: str, path: Path) -> None:
    """Raises InvalidRequest if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise InvalidRequest(option, str(path), "needs pyarrow; run `pip install pyarrow`")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and fields of every row.

    Raises:
        InvalidRequest: it is no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _given(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidRequest("--input-file", str(path), f"cannot be read as Parquet: {error}") from None


def _given(value: Any) -> Any:
    """The value without the fields of structs that are null."""
    if isinstance(value, dict):
        return {name: _given(entry) for name, entry in value.items() if entry is not None}
    return [_given(entry) for entry in value] if isinstance(value, list) else value


def read_ids(path: Path) -> Iterator[tuple[str, str]]:
    """`id` and `custom_id` of every row of an output.

    Raises:
        InvalidRequest: it is no Parquet file with these columns.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=ROWS, columns=["id", "custom_id"]):
                yield from zip(batch["id"].to_pylist(), batch["custom_id"].to_pylist(), strict=True)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise InvalidRequest("--output-file", str(path), f"is no output of a batch: {error}") from None


def write_rows(records: Iterable[bytes], target: Path) -> None:
    """Writes the lines of a journal as Parquet: a row for each sample, and one without text for a score or an
    error."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        {
            "id": pyarrow.string(),
            "custom_id": pyarrow.string(),
            "status_code": pyarrow.int32(),
            "sample": pyarrow.int32(),
            "text": pyarrow.string(),
            "token_ids": pyarrow.list_(pyarrow.int32()),
            "tokens": pyarrow.list_(pyarrow.string()),
            "token_logprobs": pyarrow.list_(pyarrow.float64()),
            "finish_reason": pyarrow.string(),
            "stop_reason": pyarrow.string(),
            "nfe": pyarrow.int32(),
            "tokens_per_forward": pyarrow.float64(),
            "seed": pyarrow.int64(),
            "prompt_tokens": pyarrow.int32(),
            "completion_tokens": pyarrow.int32(),
            "logprob": pyarrow.float64(),
            "standard_error": pyarrow.float64(),
            "num_samples": pyarrow.int32(),
            "is_greedy": pyarrow.bool_(),
            "error": pyarrow.string(),
        }
    )
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(target, schema) as writer:
        for record in records:
            rows.extend(_rows(msgspec.json.decode(record)))
            if len(rows) >= ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows.clear()
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    response = record["response"]
    common = {
        "id": record["id"],
        "custom_id": record["custom_id"],
        "status_code": response["status_code"],
    }
    body = response["body"]
    if "error" in body:
        yield {**common, "error": body["error"]["message"]}
        return
    if body["object"] == "score":
        score = body["score"]
        names = ("logprob", "standard_error", "num_samples", "is_greedy")
        yield {
            **common,
            **{name: score[name] for name in names},
            "prompt_tokens": body["usage"]["prompt_tokens"],
        }
        return
    for choice in body["choices"]:
        yield {
            **common,
            "sample": choice["index"],
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "token_ids": choice.get("token_ids"),
            **_token_logprobs(choice["logprobs"]),
            **{name: choice[name] for name in SAME},
            "stop_reason": None if choice["stop_reason"] is None else str(choice["stop_reason"]),
            "prompt_tokens": body["usage"]["prompt_tokens"],
        }


def _token_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any]:
    if logprobs is None:
        return {}
    if "content" in logprobs:
        tokens = logprobs["content"]
        return {name: [token[of] for token in tokens] for name, of in TOKEN_COLUMNS.items()}
    return {name: logprobs[name] for name in TOKEN_COLUMNS}
