"""How a worker starts, wherever it runs: the model, its row budget, and what the engine must know of both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import msgspec

from remask.workers.graphs import graphs_for
from remask.workers.knee import knee
from remask.workers.memory import row_limit
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import TransformerDenoiser, denoiser_of, pick_device
from remask.workers.models.load import load_model
from remask.workers.models.shared import SharedWeights, model_of
from remask.workers.worker import Worker


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is started with; the fields are arguments of `LLM`."""

    model: str  # a directory, on the worker's own node
    dtype: str
    device: str
    load_format: str
    batch_invariant: bool
    max_num_rows: int | None
    attention_backend: str
    quantization: str | None
    gpu_memory_utilization: float


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker tells the engine when it is ready."""

    config: ModelConfig
    max_num_rows: int  # as given, or the knee
    attention_backend: str | None  # the one in use; None: the model has no attention
    overlaps: bool  # whether launching a burst returns before it has run


def start_worker(setup: WorkerSetup, weights: SharedWeights | None = None) -> tuple[Worker, WorkerFacts]:
    """Loads the model and measures the knee where no budget is given.

    Args:
        setup: what is asked for.
        weights: the model's, where they do not come from files.

    Raises:
        InvalidRequest: the device is not here, or the checkpoint is at fault.
    """
    if weights is not None:
        model = denoiser_of(
            model_of(weights, pick_device(setup.device)),
            dtype=setup.dtype,
            attention_backend=setup.attention_backend,
            quantization=setup.quantization,
        )
    else:
        model = load_model(
            Path(setup.model),
            dtype=setup.dtype,
            device=setup.device,
            load_format=setup.load_format,
            attention_backend=setup.attention_backend,
            quantization=setup.quantization,
        )
    worker = Worker(model, graphs_for(model) if not setup.batch_invariant else None)
    max_num_rows = setup.max_num_rows
    if max_num_rows is None:
        graphs = graphs_for(model)  # which are freed with it
        max_num_rows = knee(model, graphs) if isinstance(model, TransformerDenoiser) else model.pack_rows
    if isinstance(model, TransformerDenoiser):
        limit = row_limit(model, setup.gpu_memory_utilization, lambda batch: Worker(model).run(batch))
        max_num_rows = min(max_num_rows, limit) if limit is not None else max_num_rows
    if setup.batch_invariant:
        # Products of other shapes round differently; alone, a canvas has the same shapes in any company.
        model.pack_rows = 1
    config = ModelConfig(**{field.name: getattr(model.config, field.name) for field in fields(ModelConfig)})
    attention = model.attention.name if isinstance(model, TransformerDenoiser) else None
    facts = WorkerFacts(
        config=config,
        max_num_rows=max_num_rows,
        attention_backend=attention,
        overlaps=worker.overlaps,
    )
    return worker, facts
