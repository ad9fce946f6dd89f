"""What a load is put on: the engine, an autoregressive checkpoint through transformers, or a server.

A target answers one request at a time per caller and is called from many at once; how it batches them is its
own matter. Autoregressive targets decode greedily and end at the end-of-text token or at as many tokens as a
canvas would have, so that all targets are asked for the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remask import AsyncLLM, InvalidRequest, Unavailable
from remask.benchmarks.workloads import Job

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        num_tokens: visible ones.
        nfe: model forwards that the request took part in; None: not known.
        first_token_seconds: after the request; None: everything came at once.
    """

    text: str | None
    num_tokens: int
    nfe: int | None = None
    first_token_seconds: float | None = None


class Target(AbstractAsyncContextManager["Target", None]):
    """Somebody who answers; leaving its context frees what it holds."""

    name: str

    @abstractmethod
    async def answer(self, job: Job) -> Answer:
        """Answers a request. Any exception makes it a failed one."""


class EngineTarget(Target):
    """remask, in this process or with workers on Ray.

    Args:
        engine: closed with the target.
    """

    name = "remask"

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    async def answer(self, job: Job) -> Answer:
        async for output in self._engine.generate({"prompt_token_ids": job.prompt}, job.params):
            sample = output.outputs[0]
            return Answer(sample.text, sample.num_visible_tokens, sample.nfe)
        raise Unavailable("the engine has ended")

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._engine.close)


class _Threaded(Target):
    """A target with a thread of its own that takes whatever waits."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Job, asyncio.Future[Answer]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    async def answer(self, job: Job) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put((job, future))
        return await future

    async def __aexit__(self, *_: object) -> None:
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    @abstractmethod
    def _work(self) -> None: ...

    @staticmethod
    def _tell(future: asyncio.Future[Answer], outcome: Answer | BaseException) -> None:
        def settle() -> None:
            if future.done():
                return
            if isinstance(outcome, Answer):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            future.get_loop().call_soon_threadsafe(settle)


class BatchingTarget(_Threaded):
    """A target that serves all that wait, up to a number, as one batch to its end."""

    max_batch: int

    @abstractmethod
    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers of one batch."""

    def _work(self) -> None:
        ends = False
        while not ends and (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.max_batch and not self._waiting.empty() and not ends:
                more = self._waiting.get()
                if more is None:
                    ends = True
                else:
                    batch.append(more)
            try:
                outcomes: Sequence[Answer | Exception] = self.generate([job for job, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                self._tell(future, outcome)


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
        eos, longest = self._model.config.eos_token_id, max(len(job.prompt) for job in jobs)
        pads = [longest - len(job.prompt) for job in jobs]
        ids = torch.tensor([[eos] * pad + job.prompt for pad, job in zip(pads, jobs, strict=True)])
        mask = torch.arange(longest) >= torch.tensor(pads).unsqueeze(1)
        device = self._model.device
        out = self._model.generate(
            ids.to(device),
            attention_mask=mask.long().to(device),
            max_new_tokens=max(job.params.max_tokens or 0 for job in jobs),
            do_sample=False,
            pad_token_id=eos,
        )[:, longest:].tolist()
        return [
            _answer(row[: job.params.max_tokens], eos, self._tokenizer)
            for row, job in zip(out, jobs, strict=True)
        ]


class VllmTarget(BatchingTarget):
    """vLLM's offline API, where it is installed; arguments as for `GenerateTarget`.

    Raises:
        InvalidRequest: it is not.
    """

    name = "vllm"

    def __init__(self, directory: Path, dtype: torch.dtype, max_batch: int) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise InvalidRequest("target", "vllm", f"is not installed ({error}); pip install vllm") from None
        self._params, self.max_batch = vllm.SamplingParams, max_batch
        self._llm = vllm.LLM(str(directory), dtype=str(dtype).removeprefix("torch."))
        super().__init__()

    def generate(self, jobs: Sequence[Job]) -> list[Answer]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": job.prompt} for job in jobs],
            [self._params(temperature=0, max_tokens=job.params.max_tokens) for job in jobs],
            use_tqdm=False,
        )
        samples = [output.outputs[0] for output in outputs]
        return [
            Answer(s.text, len(s.token_ids) - (s.finish_reason == "stop"), len(s.token_ids)) for s in samples
        ]


class ContinuousTarget(Target):
    """transformers' continuous batching: a paged cache, requests come and go between steps.

    Args:
        directory, dtype: as for `GenerateTarget`.
        max_requests: that run at once.
        max_len: tokens of the longest prompt and answer.
    """

    name = "transformers continuous batching"

    def __init__(
        self, directory: Path, dtype: torch.dtype, max_requests: int = 64, max_len: int = 512
    ) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # CPU memory, no psutil
        model, self._tokenizer = load_causal(directory, dtype)
        self._eos = model.config.eos_token_id
        page = 32
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=self._eos, pad_token_id=self._eos, max_new_tokens=max_len
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
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(output: Any) -> None:
            if output.is_finished() and not future.done():
                future.set_result(output)

        request_id = f"job-{id(future)}"
        with contextlib.suppress(AttributeError):
            self._manager.register_result_handler(request_id, settle)
        self._manager.add_request(
            job.prompt, request_id=request_id, max_new_tokens=job.params.max_tokens, eos_token_id=self._eos
        )
        output = await future
        if output.error is not None:
            raise Unavailable(output.error)
        return _answer(output.generated_tokens, self._eos, self._tokenizer)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._manager.stop, block=True)


class ServerTarget(Target):
    """Any server with OpenAI's `/v1/completions`, streaming.

    Args:
        url: up to but without `/v1`.
        model: what its requests name; None: the first that the server lists.
        extra: fields of every request, such as the policy of a diffusion model.

    Raises:
        Unavailable: the server does not answer.
    """

    def __init__(self, url: str, model: str | None = None, extra: dict[str, Any] | None = None) -> None:
        self._url, self._extra = url.rstrip("/").removesuffix("/v1"), extra or {}
        self.name = self._url
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=CONNECT_SECONDS) as response:
                models = json.load(response)["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"{self._url} does not answer as an OpenAI-compatible server: {error}"
            ) from None
        if model is None and not models:
            raise Unavailable(f"{self._url} serves no model")
        self._model = model or models[0]["id"]

    async def answer(self, job: Job) -> Answer:
        return await asyncio.to_thread(self._ask, job)

    async def __aexit__(self, *_: object) -> None:
        """The server is not ours."""

    def _ask(self, job: Job) -> Answer:
        body = {
            "model": self._model,
            "prompt": job.prompt if job.text is None else job.text,
            "max_tokens": job.params.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        started, first, parts, num_tokens = time.perf_counter(), None, [], None
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if not data or data == b"[DONE]" or line.startswith(b":"):
                        continue
                    event = json.loads(data)
                    if event.get("usage"):
                        num_tokens = event["usage"]["completion_tokens"]
                    text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
                    if text and first is None:
                        first = time.perf_counter() - started
                    parts.append(text)
        except urllib.error.HTTPError as error:
            told = error.read(300).decode(errors="replace")
            raise Unavailable(f"status {error.code}: {told}") from None
        text = "".join(parts)
        if num_tokens is None:
            raise Unavailable(
                "the server does not tell the tokens of an answer (stream_options.include_usage)"
            )
        return Answer(text, num_tokens, first_token_seconds=first)


def load_causal(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """An autoregressive checkpoint and its tokenizer, on a GPU where there is one.

    Raises:
        InvalidRequest: the directory holds none.
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


def _answer(ids: Sequence[int], eos: int, tokenizer: Any) -> Answer:
    """Of generated ids; each token took a forward, and so did the end."""
    ids = list(ids)
    end = ids.index(eos) if eos in ids else len(ids)
    return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True), end, nfe=min(end + 1, len(ids)))
