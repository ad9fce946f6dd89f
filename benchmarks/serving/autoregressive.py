"""Autoregressive checkpoints as targets: transformers' two ways to serve one, and vLLM's offline API.

All decode greedily and end at an end-of-text token or at as many tokens as a canvas would have, so that they
are asked for the same as the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from remask import InvalidRequest, Unavailable
from remask.benchmarks.serving.targets import Answer, BatchingTarget, Target, ThreadedTarget, settle
from remask.benchmarks.workloads import Job


class GenerateTarget(BatchingTarget):
    """transformers' `generate`: batches are padded on the left.

    Args:
        directory: an autoregressive checkpoint with a tokenizer.
        dtype: of its weights.
        max_batch: requests of a batch.
    """

    name = "transformers generate"

    def __init__(self, directory: Path, dtype: torch.dtype, max_batch: int) -> None:
        self._model, self._tokenizer = load_causal(directory, dtype)
        self.max_batch = max_batch
        super().__init__()

    @torch.inference_mode()
    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
        ends, prompts = eos_ids(self._model), [_prompt(job, self._tokenizer) for job in jobs]
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[ends[0]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.arange(longest) >= torch.tensor(pads).unsqueeze(1)
        device = self._model.device
        out = self._model.generate(
            ids.to(device),
            attention_mask=mask.long().to(device),
            max_new_tokens=max(job.params.max_tokens or 0 for job in jobs),
            do_sample=False,
            pad_token_id=ends[0],
        )[:, longest:].tolist()
        return [
            _answer(row[: job.params.max_tokens], ends, self._tokenizer)
            for row, job in zip(out, jobs, strict=True)
        ]


class VllmTarget(ThreadedTarget):
    """vLLM's offline API: requests join and leave between steps, as in its server.

    Prefix caching is off, because every repetition sends the same prompts.

    Args:
        directory, dtype: as for `GenerateTarget`.
        memory_share: share of a GPU's memory; on a CPU, whose memory other processes use, half of it.

    Raises:
        Unavailable: vLLM is not installed.
    """

    name = "vllm"

    def __init__(self, directory: Path, dtype: torch.dtype, memory_share: float) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise Unavailable(f"vllm is not installed ({error}); pip install vllm") from None
        self._engine = vllm.LLM(
            str(directory),
            dtype=str(dtype).removeprefix("torch."),
            gpu_memory_utilization=memory_share if torch.cuda.is_available() else memory_share / 2,
            enable_prefix_caching=False,
        ).llm_engine
        final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self._params = partial(vllm.SamplingParams, temperature=0, output_kind=final)
        super().__init__()

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        del self._engine  # ends its processes

    def _work(self) -> None:
        running: dict[str, asyncio.Future[Answer]] = {}
        for number in itertools.count():
            while not (running and self._waiting.empty()):
                asked = self._waiting.get()
                if asked is None:
                    return
                job, future = asked
                request_id = f"{number}-{len(running)}"
                prompt = {"prompt_token_ids": job.prompt} if job.text is None else {"prompt": job.text}
                try:
                    self._engine.add_request(
                        request_id, prompt, self._params(max_tokens=job.params.max_tokens)
                    )
                except Exception as error:
                    settle(future, error)
                else:
                    running[request_id] = future
            try:
                outputs = self._engine.step()
            except Exception as error:
                for future in running.values():
                    settle(future, error)
                running.clear()
                continue
            for output in outputs:
                if output.finished:
                    sample = output.outputs[0]
                    num_tokens = len(sample.token_ids)
                    stopped = sample.finish_reason == "stop"
                    answer = Answer(sample.text, num_tokens - stopped, nfe=num_tokens)
                    settle(running.pop(output.request_id), answer)


class ContinuousTarget(Target):
    """transformers' continuous batching: a paged cache, requests come and go between steps.

    Args:
        directory, dtype: as for `GenerateTarget`.
        max_requests: that run at once.
        jobs: what will be asked; its cache has room for the longest.
    """

    name = "transformers continuous batching"

    def __init__(self, directory: Path, dtype: torch.dtype, max_requests: int, jobs: Sequence[Job]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # CPU memory, no psutil
        model, self._tokenizer = load_causal(directory, dtype)
        self._eos_ids, self._numbers = eos_ids(model), itertools.count()
        page = 32
        max_len = max(len(_prompt(job, self._tokenizer)) + (job.params.max_tokens or 0) for job in jobs)
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False,
                eos_token_id=self._eos_ids,
                pad_token_id=self._eos_ids[0],
                max_new_tokens=max_len,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=max_requests * -(-max_len // page),
                max_batch_tokens=max(max_len, 8 * max_requests),
                max_requests_per_batch=max_requests,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()

    async def answer(self, job: Job) -> Answer:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def came_back(output: Any) -> None:
            if output.is_finished() and not future.done():
                future.set_result(output)

        request_id = f"job-{next(self._numbers)}"
        self._manager.register_result_handler(request_id, came_back)
        added = self._manager.add_request(
            _prompt(job, self._tokenizer), request_id=request_id, max_new_tokens=job.params.max_tokens
        )
        if added is None:
            raise Unavailable("continuous batching takes no requests any more")
        output = await future
        if output.error is not None:
            raise Unavailable(output.error)
        return _answer(output.generated_tokens, self._eos_ids, self._tokenizer)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._manager.stop, block=True)


def load_causal(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """An autoregressive checkpoint and its tokenizer, on a GPU if there is one.

    Raises:
        InvalidRequest: the directory is not a checkpoint or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not (directory / "config.json").is_file():
        raise InvalidRequest("baseline", str(directory), "is not a checkpoint directory")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise InvalidRequest("baseline", str(directory), f"cannot be loaded: {error}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def eos_ids(model: Any) -> list[int]:
    """The ids that end a model's texts."""
    found = model.config.eos_token_id
    return [found] if isinstance(found, int) else list(found)


def _prompt(job: Job, tokenizer: Any) -> list[int]:
    """A job's text as ids of this model's tokenizer, which may differ from the engine's tokenizer."""
    return job.prompt if job.text is None else tokenizer.encode(job.text)


def _answer(ids: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Answer:
    """The answer of generated ids. Each token took one forward, the end-of-text token included."""
    num_tokens = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:num_tokens], skip_special_tokens=True)
    return Answer(text, num_tokens, nfe=min(num_tokens + 1, len(ids)))
