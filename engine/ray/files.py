"""Batch files through Ray Data: many files of rows in, a folder of the same rows with their texts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray
from ray.data import Dataset

from remask.options import EngineOptions
from remask.ray.predictor import ERROR
from remask.ray.processor import RemaskProcessorConfig, build_processor
from remask.scheduler.errors import InvalidRequest

OF_THE_POOL = (
    "model", "distributed_executor_backend", "data_parallel_size", "num_cpus_per_worker",
    "num_gpus_per_worker", "placement_group",
)  # fmt: skip
JSON_LINES = (".jsonl", ".json", ".ndjson")


class FilesSummary(NamedTuple):
    """What a run has written: rows, and those of them that were refused or have failed."""

    num_rows: int
    num_errors: int


def run_files(
    source: str,
    output: Path,
    engine: EngineOptions,
    defaults: Mapping[str, Any],
    on_start: Callable[[int], None] = lambda _: None,
) -> FilesSummary:
    """Runs the rows of Parquet or JSON lines files on a pool of actors.

    Args:
        source: a file, a folder, or a pattern such as `data/*.parquet`. Rows have the columns of `Predictor`.
        output: the folder of the results, of the same format; must not exist or be empty.
        engine: options of the engines, `data_parallel_size` of them.
        defaults: parameters of rows that do not set them.
        on_start: called with the number of files.

    Raises:
        InvalidRequest: there are no files or files of several formats, the output exists, or the columns hold
            no prompts.
    """
    files = _files(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidRequest("output_file", str(output), "exists; name a new folder")
    given = msgspec.structs.asdict(engine)
    fields = {field.name: field for field in msgspec.structs.fields(EngineOptions)}
    own = {
        name: value
        for name, value in given.items()
        if name not in OF_THE_POOL and value != fields[name].default
    }
    processor = build_processor(
        RemaskProcessorConfig(
            model=engine.model,
            engine_kwargs=own,
            sampling_defaults=dict(defaults),
            concurrency=engine.data_parallel_size,
            num_cpus=engine.num_cpus_per_worker,
            num_gpus=engine.num_gpus_per_worker,
        )
    )
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    on_start(len(files))
    is_parquet = files[0].suffix == ".parquet"
    names = [str(path) for path in files]
    rows: Dataset = ray.data.read_parquet(names) if is_parquet else ray.data.read_json(names, lines=True)
    found = processor(rows)
    folder = str(output.absolute())
    if is_parquet:
        found.write_parquet(folder)
    else:
        found.write_json(folder)
    return counted(output, is_parquet=is_parquet)


def counted(folder: Path, *, is_parquet: bool) -> FilesSummary:
    """Counts the rows that a run has written, and their errors."""
    if not folder.is_dir():
        return FilesSummary(0, 0)  # of no rows nothing is written
    # The type of the column is given: in a file without errors all its values are null.
    schema = pa.schema([(ERROR, pa.string())])
    written = pads.dataset(folder, format="parquet" if is_parquet else "json", schema=schema)
    return FilesSummary(written.count_rows(), written.count_rows(filter=pc.field(ERROR).is_valid()))


def _files(source: str) -> list[Path]:
    """The files of a source, which have one format."""
    path = Path(source)
    if path.is_dir():
        found = [own for own in path.iterdir() if own.suffix in (".parquet", *JSON_LINES)]
    else:
        found = [path] if path.is_file() else [Path(own) for own in glob(source)]
    if not found:
        fix = "holds no .parquet or .jsonl file; name a file, a folder, or a pattern in quotes"
        raise InvalidRequest("input_file", source, fix)
    kinds = {own.suffix == ".parquet" for own in found}
    if len(kinds) > 1 or not (kinds == {True} or all(own.suffix in JSON_LINES for own in found)):
        fix = "holds files of several formats; name .parquet files or .jsonl files alone"
        raise InvalidRequest("input_file", source, fix)
    return sorted(own.absolute() for own in found)
