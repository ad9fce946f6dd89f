"""`build_processor`: the engine as a stage of a Ray dataset, as Ray has it for vLLM.

It knows pools, resources and the order of stages. What a row means is the predictor's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
from msgspec import Meta
from ray.data import ActorPoolStrategy, Dataset

from remask.embedded import absolute_name
from remask.options import EngineOptions
from remask.ray.predictor import COLUMNS, ERROR, Predictor, Row, check_columns, check_free
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.params import resolve
from remask.workers.executors.ray_resources import default_gpus

MapRow = Callable[[Row], Mapping[str, Any]]
MODEL_NAMES = ("model", "model_source")
PositiveInt = Annotated[int, Meta(ge=1)]


class RemaskProcessorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a dataset is processed.

    Attributes:
        model: As for `LLM`.
        model_source: Alias of `model`, Ray's name for it.
        engine_kwargs: Options of `EngineOptions`.
        sampling_defaults: Parameters of rows that do not set them.
        concurrency: Number of actors, each with an engine of its own; (min, max) for a pool that Ray scales.
        batch_size: Rows of a batch. If an actor dies its batches run again.
        max_concurrent_batches: Tasks that an actor works on at the same time, of up to four batches each.
        max_tasks_in_flight_per_actor: Tasks that Ray sends to an actor. None: Ray's choice.
        num_cpus: CPUs of an actor, and its number of threads.
        num_gpus: GPUs of an actor; may be a fraction, of which `gpu_memory_utilization` must be a part. None:
            1 if the engine's device is "cuda", or if it is "auto" and the cluster has GPUs.
        accelerator_type: Accelerator that an actor needs. None: any.
        runtime_env: Runtime environment of the actors. None: that of the job.
        apply_chat_template, tokenize, detokenize, chat_template_stage, tokenize_stage, detokenize_stage: The
            names of vLLM's stages, which change nothing here: the engine reads text, ids and messages.
        has_image, prepare_image_stage, prepare_multimodal_stage: Must be False: there are no images.
    """

    model: str | Path | None = None
    model_source: str | Path | None = None
    engine_kwargs: dict[str, Any] = {}
    sampling_defaults: dict[str, Any] = {}
    concurrency: PositiveInt | tuple[PositiveInt, ...] = 1  # msgspec 0.22 crashes on a pair
    batch_size: PositiveInt = 64
    max_concurrent_batches: PositiveInt = 8
    max_tasks_in_flight_per_actor: PositiveInt | None = None
    num_cpus: Annotated[float, Meta(gt=0)] = 1
    num_gpus: Annotated[float, Meta(ge=0)] | None = None
    accelerator_type: str | None = None
    runtime_env: dict[str, Any] | None = None
    apply_chat_template: bool = True
    tokenize: bool = True
    detokenize: bool = True
    chat_template_stage: bool = True
    tokenize_stage: bool = True
    detokenize_stage: bool = True
    has_image: Literal[False] = False
    prepare_image_stage: Literal[False] = False
    prepare_multimodal_stage: Literal[False] = False


class Processor:
    """A callable on datasets; see `build_processor`.

    Args:
        config: Validated here.
        preprocess, postprocess, preprocess_map_kwargs, postprocess_map_kwargs: See `build_processor`.
    """

    def __init__(
        self,
        config: RemaskProcessorConfig,
        preprocess: MapRow | None,
        postprocess: MapRow | None,
        preprocess_map_kwargs: Mapping[str, Any],
        postprocess_map_kwargs: Mapping[str, Any],
    ) -> None:
        self.config, self._model = config, _check(config)
        try:
            self._options = EngineOptions.parse(model=self._model, **config.engine_kwargs)
        except TypeError as error:
            raise InvalidRequest("engine_kwargs", list(config.engine_kwargs), str(error)) from None
        resolve(dict(config.sampling_defaults))
        self._preprocess, self._postprocess = preprocess, postprocess
        self._before, self._after = preprocess_map_kwargs, postprocess_map_kwargs

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with the engine's columns; nothing runs before it is consumed.

        Raises:
            InvalidRequest: The dataset's columns are known, and there are no prompts among them or one that
                the engine adds.
        """
        if self._preprocess is not None:
            check_free(dataset.columns(fetch_if_missing=False) or [])
            dataset = dataset.map(_Before(self._preprocess), **self._before)
        elif (names := dataset.columns(fetch_if_missing=False)) is not None:
            check_columns(names)
        dataset = dataset.map_batches(Predictor, **self._actors())  # type: ignore[arg-type]
        if self._postprocess is not None:
            dataset = dataset.map(_After(self._postprocess), **self._after)
            dataset = dataset.map_batches(_typed, batch_format="pyarrow", zero_copy_batch=True)
        return dataset

    def _actors(self) -> dict[str, Any]:
        config = self.config
        sizes = config.concurrency
        least, most = (sizes, sizes) if isinstance(sizes, int) else sizes
        num_gpus = config.num_gpus
        if num_gpus is None:
            num_gpus = default_gpus(self._options.device)
        arguments = {
            "fn_constructor_args": (self._model,),
            "fn_constructor_kwargs": {
                "sampling_defaults": config.sampling_defaults,
                **config.engine_kwargs,
            },
            "batch_size": config.batch_size,
            "batch_format": "pyarrow",
            "zero_copy_batch": True,
            "compute": ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
            ),
            "udf_modifying_row_count": False,
            "num_cpus": config.num_cpus,
            "num_gpus": num_gpus,
            "accelerator_type": config.accelerator_type,
            "runtime_env": config.runtime_env,
        }
        return {name: value for name, value in arguments.items() if value is not None}


class _Before:
    """Adds what a preprocess function returns to its row."""

    def __init__(self, function: MapRow) -> None:
        self._function = function

    def __call__(self, row: Row) -> Row:
        return {**row, **_mapping("preprocess", self._function(row))}


class _After:
    """Adds what a postprocess function returns to its row, unless the row was refused."""

    def __init__(self, function: MapRow) -> None:
        self._function = function

    def __call__(self, row: Row) -> Row:
        if row[ERROR] is not None:
            return row
        added = _mapping("postprocess", self._function(dict(row)))
        if ERROR in added:
            raise InvalidRequest("postprocess", ERROR, "is the engine's column; return another name")
        return {**row, **added}


def _typed(batch: pa.Table) -> pa.Table:
    """Gives the engine's columns their types again, which blocks of rows lose where all are null."""
    for field in COLUMNS:
        place = batch.schema.get_field_index(field.name)
        if place >= 0 and batch.column(place).null_count == batch.num_rows:
            batch = batch.set_column(place, field, batch.column(place).cast(field.type))
    return batch


def _mapping(name: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InvalidRequest(name, found, "must return a dict of columns")
    return found


def build_processor(
    config: RemaskProcessorConfig,
    preprocess: MapRow | None = None,
    postprocess: MapRow | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """A callable that adds the engine's texts to a Ray dataset.

    Names and columns are those that `ray.data.llm.build_processor` has for vLLM; see `Predictor` for the
    columns.

    Args:
        config: The model, its engine and the pool of actors.
        preprocess: Called with each row; returns the columns `prompt` or `messages`, and `sampling_params`,
            which are added to the row.
        postprocess: Called with each row that was not refused; returns columns that are added to it.
        preprocess_map_kwargs, postprocess_map_kwargs: For `Dataset.map`.

    Raises:
        InvalidRequest: A field or an option of the engine is invalid, or is given twice.
    """
    return Processor(
        config, preprocess, postprocess, preprocess_map_kwargs or {}, postprocess_map_kwargs or {}
    )


def _check(config: RemaskProcessorConfig) -> str:
    """The model; raises InvalidRequest if a field is invalid or the model is given twice or not at all."""
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if field.name in MODEL_NAMES:  # msgspec knows no paths
            if not isinstance(value, str | Path | None):
                raise InvalidRequest(field.name, value, "must be a name or a path")
            continue
        if field.type == Literal[False]:  # msgspec knows no literal flags
            if value is not False:
                raise InvalidRequest(field.name, value, "is not supported: there are no images; leave it out")
            continue
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            raise InvalidRequest(field.name, value, str(error)) from None
    sizes = config.concurrency
    if not isinstance(sizes, int) and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise InvalidRequest("concurrency", sizes, "give a number of actors, or (min, max) in this order")
    named = [name for name in MODEL_NAMES if getattr(config, name) is not None]
    named += ["engine_kwargs['model']"] if "model" in config.engine_kwargs else []
    if len(named) > 1:
        raise InvalidRequest("model", None, f"is given by {' and by '.join(named)}; keep one")
    model = config.model or config.model_source
    if model is None:
        raise InvalidRequest("model", None, "is missing; name a checkpoint in the config")
    return absolute_name(model)  # actors run in folders of their own
