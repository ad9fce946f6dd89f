"""`LLM`: a model behind a queue, for offline generation in the caller's process."""

from __future__ import annotations

import itertools
import queue
import weakref
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from remask.core import EngineCore
from remask.embedded import model_directory
from remask.intake import Intake, Message, Prompt
from remask.limits import Limits
from remask.outputs import RequestOutput, request_output
from remask.scheduler.canvas import new_probe
from remask.scheduler.errors import InvalidRequest, RemaskError
from remask.scheduler.params import SamplingParams
from remask.scheduler.plain import plain
from remask.scheduler.planning import BURST_SECONDS, OVERLAPPED_BURST_SECONDS
from remask.scheduler.request import Request
from remask.scheduler.scheduler import Scheduler
from remask.thread import EngineThread
from remask.workers.attention.select import BACKENDS
from remask.workers.executor import Executor, InProcessExecutor
from remask.workers.start import WorkerSetup

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


class LLM:
    """A masked diffusion language model that generates for many requests at once.

    Args:
        model: a local Hugging Face checkpoint directory, or "tiny" for the embedded one. Nothing is looked up
            online. A relative path starts from this process's folder, also for workers on Ray.
        tokenizer: a directory with the tokenizer; None: the model's. Without one, prompts are token ids.
        dtype: "auto" (the checkpoint's; float32 on a CPU that cannot multiply it), "float32", "bfloat16" or
            "float16".
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1".
        max_model_len: largest prompt and canvas together in tokens; None: the model's.
        seed: seeds requests that give none, with their ordinal.
        load_format: "auto": the checkpoint's weights; "dummy": random ones for its config.json, always the
            same, with which speed is measured; "object_store": the checkpoint's, read once, here, and given
            to workers on Ray through its object store, of which those of a node share one copy.
        max_num_rows: rows of a batch; a larger canvas runs alone. None: the knee, from which on more rows
            only take longer; it is measured once (some seconds) and kept under `~/.cache/remask`.
        max_num_seqs: canvases of a batch.
        batch_invariant: the same tokens, forwards and confidences to the bit, whatever else is in the batch.
            Every canvas is a forward of its own then, which is slower. (On the same kind of machine, with the
            same number of threads.)
        distributed_executor_backend: "uni": one worker in this process; "ray": workers on the Ray cluster
            that the process has joined, or else on one that is started here.
        data_parallel_size: workers on Ray, all of them fed from one queue.
        num_cpus_per_worker: what Ray reserves for each, and how many threads it computes on.
        num_gpus_per_worker: likewise; None: 1 where the device is "cuda", or "auto" and the cluster has GPUs.
        placement_group: where the workers go; None: that of the caller, if it runs in one.
        quantization: "fp8": products of the layers in fp8, with scales that need no calibration; the weights
            are bfloat16. A CPU computes the same numbers, no faster.
        attention_backend: "flash2", "flash3" and "flash4" are the flash-attn packages of these versions,
            "torch" is torch's own kernel, all of them for GPUs; "sdpa" runs everywhere. "auto": the fastest
            that is installed and serves the model.
        gpu_memory_utilization: the share of a GPU's memory that a worker may use; what the weights leave of
            it bounds the rows of its batches. A CPU has no such bound.
        burst: denoising steps between two looks at the queue; None: 1 while others wait, up to 8 otherwise.
        max_prompts_per_call: prompts of a call. This and the next four are ceilings; what is above one is
            refused before anything of the call runs. None: no ceiling.
        max_tokens_per_call: tokens of a call's canvases together: `n` times `max_tokens` of every prompt.
        max_n: `n` of a request.
        max_stop_strings: strings in `stop` of a request.
        max_stop_len: characters of each.
        max_queued_requests: requests that have not ended, of all calls together; a call that brings more is
            refused with Overloaded, and nothing of it runs. None: no ceiling.
        max_queued_tokens: tokens of their canvases, likewise.

    Calls may come from any thread, and share every step. A forked process makes an engine of its own.

    The other arguments are names to rely on; values that are not supported yet are refused.

    Raises:
        InvalidRequest: an argument or a file of the checkpoint is at fault; it is named.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        load_format: Literal["auto", "dummy", "object_store"] = "auto",
        quantization: Literal["fp8"] | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        distributed_executor_backend: Literal["uni", "ray"] = "uni",
        num_gpus_per_worker: float | None = None,
        num_cpus_per_worker: int = 1,
        placement_group: PlacementGroup | None = None,
        max_num_rows: int | None = None,
        max_num_seqs: int = 1024,
        burst: int | None = None,
        batch_invariant: bool = False,
        attention_backend: Literal["auto", "sdpa", "torch", "flash2", "flash3", "flash4"] = "auto",
        gpu_memory_utilization: float = 0.9,
        max_prompts_per_call: int | None = None,
        max_tokens_per_call: int | None = None,
        max_n: int | None = 1024,
        max_stop_strings: int | None = 16,
        max_stop_len: int | None = 256,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
    ) -> None:
        # Numbers may be NumPy's.
        seed, max_num_rows, max_num_seqs, burst, max_model_len, gpu_memory_utilization = plain(
            [seed, max_num_rows, max_num_seqs, burst, max_model_len, gpu_memory_utilization]
        )
        data_parallel_size, num_cpus_per_worker, num_gpus_per_worker = plain(
            [data_parallel_size, num_cpus_per_worker, num_gpus_per_worker]
        )
        for name, value, supported in (
            ("trust_remote_code", trust_remote_code, (False,)),
            ("load_format", load_format, ("auto", "dummy", "object_store")),
            ("quantization", quantization, (None, "fp8")),
            ("tensor_parallel_size", tensor_parallel_size, (1,)),
            ("distributed_executor_backend", distributed_executor_backend, ("uni", "ray")),
            ("batch_invariant", batch_invariant, (False, True)),
            ("attention_backend", attention_backend, ("auto", *BACKENDS)),
        ):
            if value not in supported:
                raise InvalidRequest(
                    name, value, f"is not supported yet; use {' or '.join(map(repr, supported))}"
                )
        ray_options = {
            "data_parallel_size": data_parallel_size,
            "num_gpus_per_worker": num_gpus_per_worker,
            "num_cpus_per_worker": num_cpus_per_worker,
            "placement_group": placement_group,
        }
        for name, value in (("max_num_rows", max_num_rows), ("max_num_seqs", max_num_seqs), ("burst", burst)):
            if value is None and name != "max_num_seqs":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequest(name, value, "must be a positive integer")
        limits = Limits.of(
            max_prompts_per_call=max_prompts_per_call,
            max_tokens_per_call=max_tokens_per_call,
            max_n=max_n,
            max_stop_strings=max_stop_strings,
            max_stop_len=max_stop_len,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
        )
        if not isinstance(gpu_memory_utilization, int | float) or not 0 < gpu_memory_utilization <= 1:
            fix = "must lie above 0 and not above 1"
            raise InvalidRequest("gpu_memory_utilization", gpu_memory_utilization, fix)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InvalidRequest("seed", seed, "must be an integer")
        if not isinstance(model, str | Path):
            raise InvalidRequest("model", model, "give a local checkpoint directory, or 'tiny'")
        if tokenizer is not None and not isinstance(tokenizer, str | Path):
            raise InvalidRequest("tokenizer", tokenizer, "give a local directory")
        with model_directory(model) as directory:
            # The tokenizer first: it is small, and what is wrong with it shows before weights are read.
            self.tokenizer = load_tokenizer(
                directory if tokenizer is None else Path(tokenizer), tokenizer is not None
            )
            setup = WorkerSetup(
                # Workers on Ray run in folders of their own; a relative path is the caller's.
                model=str(directory.absolute() if distributed_executor_backend == "ray" else directory),
                dtype=dtype,
                device=device,
                load_format=load_format,
                batch_invariant=batch_invariant,
                max_num_rows=max_num_rows,
                attention_backend=attention_backend,
                quantization=quantization,
                gpu_memory_utilization=gpu_memory_utilization,
            )
            executor = _executor(distributed_executor_backend, setup, ray_options)
        config = executor.facts.config
        max_len = config.max_len if max_model_len is None else max_model_len
        if not isinstance(max_len, int) or not 2 <= max_len <= config.max_len:
            executor.close()
            raise InvalidRequest(
                "max_model_len", max_model_len, f"must lie between 2 and the model's {config.max_len}"
            )
        scheduler = Scheduler(
            max_num_rows=executor.max_num_rows,
            max_num_seqs=max_num_seqs,
            burst=burst,
            probe=new_probe(config.mask_id),
            burst_seconds=OVERLAPPED_BURST_SECONDS if executor.facts.overlaps else BURST_SECONDS,
        )
        self._intake = Intake(config, self.tokenizer, max_len=max_len, seed=seed, limits=limits)
        self._executor = executor
        self._thread = EngineThread(EngineCore(scheduler, executor), limits)
        self._close = weakref.finalize(self, self._thread.close)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams
        | dict[str, Any]
        | Iterable[SamplingParams | dict[str, Any]]
        | None = None,
        *,
        use_tqdm: bool = True,
        priority: Iterable[int] | None = None,
    ) -> list[RequestOutput]:
        """Fills a canvas behind each prompt.

        Args:
            prompts: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; or a list, an array,
                a column or an iterator of these. Ids may be an array, too.
            sampling_params: one for all prompts, or a list or iterator with one for each.
            use_tqdm: show progress on a terminal.
            priority: an integer for each prompt, the lower the sooner; overrides that of the parameters.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InvalidRequest: naming the prompt's index and the parameter; nothing of the call has run.
            Overloaded: more is live than the engine's options allow; nothing of the call has run.
            EngineDead: the engine was closed, also from another thread, or has failed.
            Unavailable: there is no worker, and none is coming.
        """
        self._thread.check_alive()
        requests = self._intake.requests(prompts, sampling_params, priority)
        return self._run(requests, show_progress=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams
        | dict[str, Any]
        | Sequence[SamplingParams | dict[str, Any]]
        | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The assistant's next turn of one conversation or of many; see `generate`.

        The content of a message is text, or a list of parts `{"type": "text", "text": ...}`.
        """
        return self.generate(self._intake.chat_prompts(messages), sampling_params, use_tqdm=use_tqdm)

    def scale(self, num_workers: int) -> None:
        """Wants another number of workers on Ray; may be called from any thread, while requests run.

        Raises:
            InvalidRequest: the engine is not on Ray, or the cluster has too little.
        """
        num_workers = plain(num_workers)
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            raise InvalidRequest("num_workers", num_workers, "must be a positive integer")
        self._executor.scale(num_workers)

    def close(self) -> None:
        """Frees the model and the workers; idempotent, from any thread. Calls that run, and later ones, raise
        EngineDead."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, requests: list[Request], *, show_progress: bool) -> list[RequestOutput]:
        num_tokens = num_forwards = 0
        outputs: dict[str, RequestOutput] = {}
        with _progress_bar(show_progress) as bar:
            task = bar.add_task("generating", total=len(requests), rate="")
            for output in self._serve(requests):
                outputs[output.request_id] = output
                num_tokens += sum(sample.num_visible_tokens for sample in output.outputs)
                num_forwards += sum(sample.nfe for sample in output.outputs)
                bar.update(task, advance=1, rate=f"{num_tokens / max(1, num_forwards):.1f} tokens/forward")
        return [outputs[request.request_id] for request in requests]

    def _serve(
        self, requests: Iterable[Request], *, max_live: int | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Outputs in the order in which requests finish; at most `max_live` are taken from `requests` ahead.

        Closing the generator, or an error in it, forgets what has not finished.
        """
        source = iter(requests)
        ended: queue.SimpleQueue[Request | RemaskError] = queue.SimpleQueue()
        live: set[str] = set()
        try:
            while True:
                more = list(itertools.islice(source, None if max_live is None else max_live - len(live)))
                live.update(request.request_id for request in more)
                if not live:
                    return
                if more:
                    self._thread.add(more, ended.put)
                request = ended.get()
                if isinstance(request, RemaskError):
                    self._thread.check_alive()
                    raise request
                live.discard(request.request_id)
                yield request_output(request, self._intake.decode)
        finally:
            self._thread.abort(live)


def _executor(backend: str, setup: WorkerSetup, ray_options: dict[str, Any]) -> Executor:
    """The workers, started.

    Raises:
        InvalidRequest: an option cannot be, or asks for Ray where it is not used; or a worker says so.
    """
    if backend != "ray":
        neutral = {"data_parallel_size": 1, "num_cpus_per_worker": 1}
        for name, value in ray_options.items():
            if value != neutral.get(name):
                fix = "is for workers on Ray; set distributed_executor_backend='ray'"
                raise InvalidRequest(name, value, fix)
        if setup.load_format == "object_store":
            raise InvalidRequest("load_format", setup.load_format, "is for workers on Ray; use auto")
        return InProcessExecutor(setup)
    for name in ("data_parallel_size", "num_cpus_per_worker"):
        value = ray_options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidRequest(name, value, "must be a positive integer")
    num_gpus = ray_options["num_gpus_per_worker"]
    if num_gpus is not None and (not isinstance(num_gpus, int | float) or num_gpus < 0):
        raise InvalidRequest("num_gpus_per_worker", num_gpus, "must be a number, 0 or more")

    from remask.workers.ray_executor import RayExecutor

    return RayExecutor(
        setup,
        num_workers=ray_options["data_parallel_size"],
        num_cpus=ray_options["num_cpus_per_worker"],
        num_gpus=num_gpus,
        placement_group=ray_options["placement_group"],
    )


def load_tokenizer(directory: Path, required: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory (`tokenizer.json`), never looked up online; None where there is none.

    Raises:
        InvalidRequest: it cannot be read, or is missing and required.
    """
    if not (directory / "tokenizer.json").is_file():
        if required:
            raise InvalidRequest("tokenizer", str(directory), "holds no tokenizer.json")
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise InvalidRequest("tokenizer", str(directory), f"cannot be read: {error}") from None


def _progress_bar(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        *Progress.get_default_columns()[:3],
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
