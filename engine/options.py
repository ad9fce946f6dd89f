"""`EngineOptions`: the options of an engine, and the one place where they are validated.

`LLM`, `AsyncLLM`, batch files and the commands take these options; their signatures, flags and help are
derived from the struct. Options that depend on the model or a device (`dtype`, `device`, `max_model_len`) are
checked when these are known.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest, did_you_mean
from remask.scheduler.plain import plain
from remask.workers.startup.setup import PositiveInt, WorkerOptions, fix

Ceiling = Annotated[int, Meta(ge=1, extra=fix("must be a positive integer, or None for no ceiling"))]
Integer = Annotated[int, Meta(extra=fix("must be an integer"))]
RAY_ONLY = ("data_parallel_size", "num_gpus_per_worker", "num_cpus_per_worker", "placement_group")


class EngineOptions(WorkerOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of an engine. The constructor stores them unchecked; `parse` validates them.

    Attributes:
        model: Local Hugging Face checkpoint directory, or "tiny" for the embedded model. Nothing is looked up
            online. A relative path starts from the folder of this process, also for workers on Ray.
        tokenizer: Directory of the tokenizer. None: the model's. Without a tokenizer, prompts are token ids.
        dtype: "auto" (the checkpoint's; float32 on a CPU that cannot multiply it), "float32", "bfloat16" or
            "float16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        max_model_len: Maximum tokens of prompt and canvas together. None: the model's.
        seed: Seed of requests that set none, combined with their index.
        trust_remote_code: Must be False: code of a checkpoint is never run.
        load_format: "auto" (the checkpoint's weights), "dummy" (random weights) or "object_store" (weights
            sent to workers on Ray). Random weights are equal for equal config.json files and serve to measure
            speed. The object store gets the weights once, from this process, and the workers of a node share
            one copy.
        quantization: "fp8": the products of the layers run in fp8, with scales that need no calibration. The
            weights are bfloat16. A CPU computes the same numbers, but no faster.
        tensor_parallel_size: GPUs that share one copy of the model. Values above 1 are not supported yet.
        distributed_executor_backend: "uni" (one worker in this process) or "ray" (workers on a Ray cluster).
            The cluster is the one that the process has joined, else one that is started here.
        data_parallel_size: Number of workers on Ray, all fed from one queue.
        num_gpus_per_worker: GPUs that Ray reserves for each worker. None: 1 if the device is "cuda", or if it
            is "auto" and the cluster has GPUs.
        num_cpus_per_worker: CPUs that Ray reserves for each worker, and the worker's number of threads.
        placement_group: Placement group of the workers. None: that of the caller, if it runs in one.
        max_num_rows: Maximum rows of a batch; a larger canvas runs alone. None: the knee, beyond which more
            rows only take longer; it is measured once (some seconds) and kept under `~/.cache/remask`.
        max_num_seqs: Maximum canvases of a batch.
        burst: Denoising steps per burst. None: adapted, up to 8, and at most 50 ms while others wait.
        batch_invariant: Write equal tokens, forwards and confidences to the bit, whatever else is in the
            batch. Every canvas is a forward of its own then, which is slower. It holds on machines of one
            kind with equal numbers of threads.
        attention_backend: "auto" (the fastest that is installed and serves the model), "sdpa", "torch",
            "flash2", "flash3" or "flash4". The last three are the flash-attn packages of these versions, and
            "torch" is PyTorch's own kernel, all of them for GPUs; "sdpa" runs everywhere.
        gpu_memory_utilization: Share of a GPU's memory that a worker may use. The part that the weights leave
            bounds the rows of its batches. A CPU has no such bound.
        max_key_bytes: Maximum bytes of a worker for the keys and values of requests that reuse them. They are
            taken while such requests run. A request that needs more runs without reuse. None: on a CPU 4 GiB,
            at most a quarter of the memory; on a GPU a quarter of what the weights leave.
        max_prompts_per_call: Maximum prompts of a call. None: no ceiling. A call that exceeds this ceiling or
            one of the next four is refused before anything of it runs.
        max_tokens_per_call: Maximum tokens of the canvases of a call: `n` times `max_tokens` of every prompt.
        max_n: Maximum `n` of a request.
        max_stop_strings: Maximum strings in `stop` of a request; equal ones count once.
        max_stop_len: Maximum characters of a stop string.
        max_queued_requests: Maximum live requests, of all calls together. None: no ceiling. A call that
            exceeds it is refused with Overloaded, and nothing of it runs.
        max_queued_tokens: Maximum tokens of the canvases of live requests. None: no ceiling.
    """

    model: Annotated[str | Path, Meta(extra=fix("give a local checkpoint directory, or 'tiny'"))]
    tokenizer: Annotated[str | Path | None, Meta(extra=fix("give a local directory"))] = None
    max_model_len: Integer | None = None
    seed: Integer = 0
    trust_remote_code: Literal[False] = False
    tensor_parallel_size: Literal[1] = 1
    distributed_executor_backend: Literal["uni", "ray"] = "uni"
    data_parallel_size: PositiveInt = 1
    num_gpus_per_worker: Annotated[float, Meta(extra=fix("must be a number, 0 or more"))] | None = None
    num_cpus_per_worker: PositiveInt = 1
    placement_group: Any = None
    max_num_seqs: PositiveInt = 1024
    burst: PositiveInt | None = None
    max_prompts_per_call: Ceiling | None = None
    max_tokens_per_call: Ceiling | None = None
    max_n: Ceiling | None = 1024
    max_stop_strings: Ceiling | None = 16
    max_stop_len: Ceiling | None = 256
    max_queued_requests: Ceiling | None = None
    max_queued_tokens: Ceiling | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model: the option as given, and the name of the directory."""
        return tuple(dict.fromkeys((str(self.model), Path(self.model).name)))

    @classmethod
    def parse(cls, **given: Any) -> EngineOptions:
        """Validated options; numbers may be NumPy's.

        Raises:
            InvalidRequest: an option is invalid; the error names it.
            TypeError: an option is unknown, or the model is missing.
        """
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        unknown = next((name for name in given if name not in fields), None)
        if unknown is not None:
            raise TypeError(f"there is no option {unknown!r}; {did_you_mean(unknown, list(fields))}")
        given = {name: value if fields[name].type is Any else plain(value) for name, value in given.items()}
        options = cls(**given)
        if options.distributed_executor_backend == "uni":
            for name in RAY_ONLY:
                if getattr(options, name) != fields[name].default:
                    problem = "is for workers on Ray; set distributed_executor_backend='ray'"
                    raise InvalidRequest(name, getattr(options, name), problem)
        for name, value in given.items():
            if not _fits(value, fields[name].type):
                raise InvalidRequest(name, value, _fix(fields[name].type))
        if options.num_gpus_per_worker is not None and options.num_gpus_per_worker < 0:
            kind = fields["num_gpus_per_worker"].type
            raise InvalidRequest("num_gpus_per_worker", options.num_gpus_per_worker, _fix(kind))
        if options.load_format == "object_store" and options.distributed_executor_backend == "uni":
            raise InvalidRequest("load_format", options.load_format, "is for workers on Ray; use auto")
        return options


def choices(kind: Any) -> tuple[Any, ...]:
    """The values that a field of this type allows, if the type lists them; else empty."""
    if kind is bool:
        return (False, True)
    return get_args(kind) if get_origin(kind) is Literal else ()


def call_signature() -> inspect.Signature:
    """The options as parameters of a call, the model first."""
    (model, *others) = sorted(
        inspect.signature(EngineOptions).parameters.values(), key=lambda p: p.default is not p.empty
    )
    arguments = [model.replace(kind=model.POSITIONAL_OR_KEYWORD), *others]
    return inspect.Signature([p.replace(annotation=plain_type(p.annotation)) for p in arguments])


def plain_type(kind: Any) -> Any:
    """A field's type without its bounds."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(plain_type(entry) for entry in get_args(kind))]  # noqa: UP007
    return kind


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if listed := choices(kind):
        return any(type(value) is type(choice) and value == choice for choice in listed)
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) is UnionType:  # msgspec knows no paths
        return isinstance(value, get_args(kind)[0])
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _fix(kind: Any) -> str:
    """What an error says of a value that a field of this type does not take."""
    if listed := choices(kind):
        return f"is not supported yet; use {' or '.join(map(repr, listed))}"
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (entry for entry in get_args(kind) if entry is not NoneType)
    (meta,) = (entry for entry in get_args(kind) if isinstance(entry, Meta))
    assert meta.extra is not None, "every bounded field says what it takes"
    return str(meta.extra["fix"])
