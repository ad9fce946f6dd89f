"""The start of a worker, in process and on Ray, and the row budget of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from remask.workers.burst.graphs import graphs_for
from remask.workers.models.denoiser import TransformerDenoiser, denoiser_of, pick_device
from remask.workers.models.load import load_model
from remask.workers.models.shared import SharedWeights, model_of
from remask.workers.models.update import num_bytes
from remask.workers.startup.keys import max_key_rows
from remask.workers.startup.knee import knee
from remask.workers.startup.memory import row_limit
from remask.workers.startup.setup import WorkerSetup
from remask.workers.startup.warm_up import warm_up
from remask.workers.worker import Worker


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker reports to the engine when it is ready."""

    row_limit: int | None  # maximum rows of a forward that fit its memory; None: no limit
    attention_backend: str | None  # the backend in use; None: the model has no attention
    overlaps: bool  # whether launching a burst returns before it has run
    max_key_rows: int  # rows whose keys and values it keeps; 0: it cannot keep any
    weights_dtype: str | None = None  # torch's name, before quantization; None: the model is no transformer
    weight_bytes: int | None = None  # of all weights in this dtype


def start_worker(setup: WorkerSetup, weights: SharedWeights | None = None) -> tuple[Worker, WorkerFacts]:
    """Loads the model, warms up its kernels and measures its row limit.

    Args:
        setup: configuration of the worker.
        weights: weights of the model; None: they are read from files.

    Raises:
        InvalidRequest: the device does not exist, or the checkpoint is invalid.
        RuntimeError: the device cannot run the model's kernels.
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
    packs = not setup.batch_invariant or model.use_tiles()
    limit, num_key_rows = None, max_key_rows(model, setup.max_key_bytes, setup.gpu_memory_utilization)
    if isinstance(model, TransformerDenoiser):
        if model.kernels:
            warm_up(model, lambda batch: Worker(model).run(batch))
        limit = row_limit(
            model,
            setup.gpu_memory_utilization,
            lambda batch: Worker(model).run(batch),
            num_key_rows * model.key_row_bytes,
        )
    graphs = None if setup.batch_invariant else graphs_for(model)
    worker = Worker(model, graphs, packs=packs, max_key_rows=num_key_rows)
    attention = weights_dtype = weight_bytes = None
    if isinstance(model, TransformerDenoiser):
        attention, dtype = model.attention.name, model.model.embedding.dtype
        weights_dtype, weight_bytes = str(dtype).removeprefix("torch."), num_bytes(model.config, dtype)
    facts = WorkerFacts(
        row_limit=limit,
        attention_backend=attention,
        overlaps=worker.overlaps,
        max_key_rows=num_key_rows,
        weights_dtype=weights_dtype,
        weight_bytes=weight_bytes,
    )
    return worker, facts


def measure_knee(worker: Worker, setup: WorkerSetup) -> int:
    """The knee: the number of rows above which the time of a forward is proportional to its rows.

    The measurement occupies the machine for some seconds, so one worker measures for all while the others are
    idle."""
    model = worker.model
    if not isinstance(model, TransformerDenoiser):
        return model.pack_rows
    graphs = None if setup.batch_invariant else graphs_for(model)  # freed after the measurement
    return knee(model, graphs)


def row_budget(num_rows: int, limits: Iterable[int | None]) -> int:
    """Maximum rows of a batch: `num_rows`, or the smallest row limit of a worker."""
    return min([num_rows, *(limit for limit in limits if limit is not None)])
